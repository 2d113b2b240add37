"""A module judged by its own validation step on its own data; the outer Trainer sees nothing."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from clipquant.budget.chance import Judged, Parts, jackknife_error
from clipquant.callbacks.road.data import Portion, combined, kept_generators, validation_loaders
from clipquant.callbacks.road.parts import Recorder
from clipquant.callbacks.road.road import Road
from clipquant.errors import ClipquantError, RunError
from clipquant.quant.network.outputs import tensors_of

PASSES = 16  # parts at most of a metric that each part is validated for


def judge(
    road: Road,
    state: Mapping[str, Tensor] | None = None,
    *,
    forward: Callable[..., Any] | None = None,
    limit: Any = None,
    what: str = "judging",
) -> dict[str, float]:
    """Return every metric that a validation of the guest logs, on one device, the same batches each time.

    Args:
        road: The road; its guest ends as it was.
        state: Weights to judge instead of the guest's own.
        forward: What runs in the place of the guest's `forward`.
        limit: As `limit_val_batches`; None: as the outer Trainer's.
        what: What is being judged, for whoever shows progress.

    Returns:
        Name -> value; empty where the Trainer has no validation data.
    """
    loaders = validation_loaders(road)
    if loaders is None:
        return {}
    with kept_generators(road, loaders), weights(road.guest, state), replaced(road.guest, forward):
        limit = road.trainer.limit_val_batches if limit is None else limit
        return road.run(loaders, limit=limit, what=what)


def judge_parts(
    road: Road,
    monitor: str,
    state: Mapping[str, Tensor] | None = None,
    *,
    apart: bool = False,
    what: str = "judging",
) -> Judged:
    """Return what `judge` does, with the monitored metric over disjoint parts of the same batches.

    Every metric is Lightning's own, of one pass over all batches. The parts of a mean, and of a torchmetrics
    object whose states add up, are read off the same pass. Of any other metric, such as one that is computed at
    the end of the epoch, each part is a validation of its own: all parts together are a second pass.

    Args:
        road: The road; its guest ends as it was.
        monitor: The metric.
        state: Weights to judge instead of the guest's own.
        apart: Whether a second pass is worth its time.
        what: What is being judged, for whoever shows progress.
    """
    loaders = validation_loaders(road)
    if loaders is None:
        return Judged({}, whole_only="there is no validation")
    recorder = Recorder(monitor)
    with kept_generators(road, loaders), weights(road.guest, state):
        limit = road.trainer.limit_val_batches
        metrics = road.run(loaders, limit=limit, what=what, recorder=recorder)
        name = logged_as(recorder.monitor, monitor, metrics)
        if recorder.parts or not apart or name is None:
            return Judged(metrics, recorder.parts)
        try:
            parts = _passes(road, loaders, name, recorder.batches, what)
            _check_whole(parts, metrics[name])
        except (
            Exception
        ) as error:  # a step that asks for all batches, a metric that needs every class
            kind = "" if isinstance(error, ClipquantError) else f"{type(error).__name__}: "
            return Judged(metrics, whole_only=f"{kind}{error}")
    return Judged(metrics, {name: parts})


def logged_as(monitor: str, asked: str, metrics: Mapping[str, float]) -> str | None:
    """Return the name under which a metric was logged; None where it was not.

    >>> logged_as("acc", "acc", {"acc/dataloader_idx_0": 0.5})
    'acc/dataloader_idx_0'
    """
    return next((n for n in (asked, monitor, f"{monitor}/dataloader_idx_0") if n in metrics), None)


def _passes(road: Road, loaders: Any, name: str, batches: Sequence[float], what: str) -> Parts:
    """Return a metric over parts of the batches, one after the other, each validated by itself.

    Raises:
        RunError: If there are too few batches, or a part has no such metric.
    """
    whole = combined(road.trainer, loaders, "sequential")
    parts = int(min(PASSES, *batches))
    if not all(map(math.isfinite, batches)) or parts < 2:
        raise RunError(
            f"validation has {min(batches):g} batch; two or more tell by how much chance moves the metric"
        )
    portions = copy.copy(whole)
    portions.flattened = [
        Portion(loader, int(count), parts)
        for loader, count in zip(whole.flattened, batches, strict=True)
    ]
    counts, values = [], []
    for part in range(parts):
        for portion in portions.flattened:
            portion.part = part
        counts.append(sum(map(len, portions.flattened)))
        values.append(
            road.run(portions, what=f"{what}, part {part + 1} of {parts}").get(name, math.nan)
        )
        if not math.isfinite(values[-1]):
            raise RunError(f"{name} of part {part + 1} is {values[-1]}")
    return Parts.of_means(counts, [n * value for n, value in zip(counts, values, strict=True)])


def _check_whole(parts: Parts, whole: float) -> None:
    """Raise where a metric is nothing like the mean of its parts, as a sum or the largest of all is not."""
    error = jackknife_error(parts.samples, parts.without, parts.whole)
    if abs(parts.whole - whole) > 4 * error + 1e-4 * abs(whole):
        raise RunError("the whole is no mean of its parts")


@contextmanager
def weights(model: nn.Module, state: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Let a model hold other weights for a time, wherever it holds those of their names.

    Args:
        model: Any module.
        state: State-dict key -> value; None: its own.
    """
    own: dict[str, Tensor] = model.state_dict(keep_vars=True)
    changed = {k: v for k, v in (state or {}).items() if isinstance(own.get(k), Tensor)}
    before = [(own[name], own[name].data) for name in changed]
    try:
        for name, value in changed.items():
            held = own[name]
            held.data = value.detach().to(held.device, held.dtype, copy=True).reshape(held.shape)
        yield
    finally:
        for held, data in before:
            held.data = data


@contextmanager
def replaced(guest: pl.LightningModule, forward: Callable[..., Any] | None) -> Iterator[None]:
    """Let something else run in the place of a module's `forward` for a time; None: nothing else."""
    if forward is None:
        yield
        return
    own, before = vars(guest), vars(guest).get("forward")
    guest.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        own.pop("forward")
        own.update({} if before is None else {"forward": before})


@contextmanager
def watched(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that each part of a model adds the mean of its outputs to."""
    seen: list[Tensor] = []

    def see(_module: nn.Module, _args: Any, output: Any) -> None:
        with torch.no_grad():
            seen.extend(t.detach().double().mean() for t in tensors_of(output))

    parts = [part.register_forward_hook(see) for part in model.modules() if part is not model]
    try:
        yield seen
    finally:
        for part in parts:
            part.remove()
