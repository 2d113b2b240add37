"""Where the weights of a model are used: the modules whose calls tell what they meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.errors import RunError
from clipquant.quant.codes.paths import submodule
from clipquant.quant.network.calibration import Calibration, EndLoop, Forward
from clipquant.quant.network.layers import Target, weights_of
from clipquant.quant.network.patches import Reader, heads_output, reader_of


@dataclass(frozen=True)
class Watch:
    """One place where a weight is used: the module whose calls tell its inputs, and how to read them."""

    module: nn.Module
    target: Target
    read: Reader


@dataclass(frozen=True)
class Use:
    """How a weight was met in one forward pass: when first, with which inputs, how often."""

    order: int
    inputs: tuple[int, ...]
    calls: int


def watches_of(model: nn.Module, target: Target) -> tuple[list[Watch], list[str]]:
    """Return where in `model` a weight is used, tied uses included, and why a use cannot be read."""
    projections = {
        id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    watches, reasons = [], []
    for place in _places(model, target):
        parent = projections.get(id(place.module))
        read = reader_of(place) if parent is None else partial(heads_output, parent)
        if isinstance(read, str):
            reasons.append(read)
        else:
            watches.append(Watch(place.module if parent is None else parent, place, read))
    return watches, reasons


def _places(model: nn.Module, target: Target) -> Iterator[Target]:
    """Yield each weight of `model` that is the target's tensor."""
    held = target.name.rpartition(".")
    owner = submodule(model, held[0])
    weight = getattr(owner, held[2])
    for place in weights_of(model):
        if place.weight is weight:
            yield place


@contextmanager
def watched_calls(watches: Sequence[Watch], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(index of the watch, inputs)` at every call of a watched module."""
    busy = False

    def hook(index: int, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy = True  # reading an attention's heads runs it again
        try:
            see(index, watches[index].read((args, kwargs, output)))
        finally:
            busy = False

    handles = [
        watch.module.register_forward_hook(partial(hook, index), with_kwargs=True)
        for index, watch in enumerate(watches)
    ]
    try:
        with torch.no_grad(), plain_attention():
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def plain_attention() -> Iterator[None]:
    """Keep torch's attention off the fast path, which would pass its layers by."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def uses(targets: Sequence[Target], model: nn.Module, calibration: Calibration) -> dict[str, Use]:
    """Return how each weight that the data reach is used, in the order of first use.

    As few batches are run as it takes to meet every weight whose inputs can be read. Weights that
    first meet the very same tensor, such as query, key and value, share `inputs`.

    Args:
        targets: The weights.
        model: Holds them; runs each batch.
        calibration: Batches, and how to run them.

    Raises:
        RuntimeError: If the model raises, naming the batch.
    """
    seen: dict[str, Use] = {}
    missing = [t for t in targets if watches_of(model, t)[0]]

    def visit(number: int, batch: Any) -> None:
        nonlocal missing
        try:
            met = _uses(model, missing, batch, calibration.forward)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise RunError(
                f"the model could not run on calibration batch {number} "
                f"({type(batch).__name__}): {type(error).__name__}: {error}. A dict is passed as keywords, "
                "a tuple as positional arguments, anything else as the one input."
            ) from error
        seen.update({k: replace(u, order=u.order + len(seen)) for k, u in met.items()})
        missing = [t for t in missing if t.name not in seen]
        if not missing:
            raise EndLoop

    calibration.each(visit)
    return seen


def _uses(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Forward
) -> dict[str, Use]:
    """Return how each weight that one batch reaches is used."""
    watches = [(t.name, w) for t in targets for w in watches_of(model, t)[0]]
    met: dict[str, Use] = {}
    alive: list[Tensor] = []  # keeps the identity of the inputs unique during the pass

    def see(index: int, value: Tensor) -> None:
        name = watches[index][0]
        alive.append(value)
        key = (value.data_ptr(), value._version, *value.shape)
        first = met.get(name)
        met[name] = (
            Use(len(met), key, 1) if first is None else replace(first, calls=first.calls + 1)
        )

    with watched_calls([w for _, w in watches], see):
        forward(model, batch)
    return met
