"""A module judged by its own validation step on its own data; the outer Trainer sees nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from clipquant.callbacks.road.data import kept_generators, validation_loaders
from clipquant.callbacks.road.road import Road
from clipquant.quant.network.outputs import tensors_of


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
