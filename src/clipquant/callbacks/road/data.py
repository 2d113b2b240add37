"""The Trainer's own data, asked anew: every process's samples, and random states left as they were."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from clipquant.callbacks.lightning import package_of
from clipquant.callbacks.road.nested import nested_trainer
from clipquant.callbacks.road.ranks import alone
from clipquant.callbacks.road.road import Road
from clipquant.callbacks.road.silence import OF_OTHERS
from clipquant.quant.network.state import seeded

Mode = Literal["sequential", "max_size_cycle"]


class Listed:
    """Batches in an order, as one dataloader: a list would be as many dataloaders as it has items."""

    def __init__(self, batches: Any, order: Any) -> None:
        self.batches, self.order = batches, list(order)
        self.ended = False

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[Any]:
        for number in self.order:
            if self.ended:
                return
            yield self.batches[number]


class Portion:
    """A dataloader in consecutive parts: each iteration goes on where the one before has stopped.

    Args:
        loader: The dataloader.
        count: Its batches, as far as they are used.
        parts: How many parts.
    """

    def __init__(self, loader: Any, count: int, parts: int) -> None:
        self.loader, self.part = loader, 0
        self.ends = [count * part // parts for part in range(parts + 1)]
        self._batches: Iterator[Any] | None = None

    def __len__(self) -> int:
        return self.ends[self.part + 1] - self.ends[self.part]

    def __iter__(self) -> Iterator[Any]:
        if self._batches is None:
            self._batches = iter(self.loader)
        yield from islice(self._batches, len(self))


def validation_loaders(road: Road) -> Any:
    """Return the validation dataloaders asked anew; None where there are none, or no step to run."""
    if not road.has_step or road.trainer.limit_val_batches == 0:
        return None
    return loaders(road, "val")


def loaders(road: Road, stage: str) -> Any:
    """Return the dataloaders of a stage ("train" or "val") asked anew from where fit got them.

    The loaders that the Trainer holds may carry samplers for one process of several; these are the
    user's own, asked as by a run on one device. None where there are none.
    """
    loop = road.trainer.fit_loop if stage == "train" else road.trainer.fit_loop.epoch_loop.val_loop
    if road.before:
        return _held(loop._combined_loader)
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    if not source.is_module():
        return source.instance
    own = source.instance is not road.trainer.datamodule  # type: ignore[attr-defined]
    place: Any = road.guest if own else source.instance
    with seeded(0), alone(), nested_trainer(road.trainer, road.silence) as inner:
        before = place._trainer if own else None
        if own:
            place._trainer = inner
        try:
            return getattr(place, source.name)()
        finally:
            if own:
                place._trainer = before


def _held(loader: Any) -> Any:
    """Return the dataloaders that the Trainer holds; None where a look at them would use them up."""
    if loader is None or any(map(is_spent, loader.flattened)):
        return None
    return copy.copy(loader)  # its limits are set, and the outer loop's must stay


def is_spent(data: Any) -> bool:
    """Return whether an iterable gives its items only once, so that looking at it would take them away.

    >>> is_spent(iter([1])), is_spent([1])
    (True, False)
    """
    if isinstance(data, torch.utils.data.DataLoader) or not hasattr(data, "__iter__"):
        return False
    return iter(data) is iter(data) if not isinstance(data, (list, tuple, dict)) else False


@contextmanager
def kept_generators(road: Road, loaders: Any) -> Iterator[None]:
    """Leave the random generators that dataloaders carry as they were."""
    flat = combined(road.trainer, loaders, "sequential").flattened
    held = [getattr(part, "generator", None) for part in flat]
    held += [getattr(getattr(part, "sampler", None), "generator", None) for part in flat]
    states = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def combined(trainer: pl.Trainer, loaders: Any, mode: str) -> Any:
    """Return loaders as one: the user's own CombinedLoader, or one of a mode."""
    kind = package_of(trainer).utilities.CombinedLoader
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=OF_OTHERS)
        return loaders if isinstance(loaders, kind) else kind(loaders, mode)


def batches_of(road: Road, stage: str, count: int, mode: Mode) -> list[Any]:
    """Return the first batches of a stage, the same each time; random states are left as they were.

    Args:
        road: Tells the Trainer.
        stage: "train" or "val".
        count: How many at most.
        mode: Where there are several dataloaders: "sequential" gives batches of each, "max_size_cycle"
            what `training_step` gets.
    """
    limit = getattr(road.trainer, f"limit_{stage}_batches")
    if isinstance(limit, int):
        count = min(count, limit)
    if count == 0:
        return []
    with seeded(0), alone():
        own = loaders(road, stage)
        if own is None:
            return []
        with kept_generators(road, own):
            return [batch for batch, _, _ in islice(iter(combined(road.trainer, own, mode)), count)]


def several_loaders(road: Road) -> int:
    """Return how many dataloaders validation goes through one after the other."""
    loop = road.trainer.fit_loop.epoch_loop.val_loop
    if loop._combined_loader is None or not loop._is_sequential:
        return 1
    return max(loop.num_dataloaders, 1)
