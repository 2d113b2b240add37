"""Which metric judges and which way it is better: never guessed, always with where it is known from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.lightning import package_of
from clipquant.callbacks.road.logged import Natures, nature_of

WAYS = {"min": "lower is better", "max": "higher is better"}


@dataclass(frozen=True)
class Watch:
    """The metric that judges.

    Args:
        name: Its name.
        mode: "min" or "max"; None: nobody has said.
        why: Where the mode is known from, in words.
        conflict: What speaks against the mode, in words; empty where nothing does.
    """

    name: str
    mode: str | None
    why: str
    conflict: str = ""

    @property
    def unknown(self) -> str:
        """What is missing and how to say it, where the mode is not known."""
        return (
            f"monitor={self.name!r} without mode: is more of it better, or less? Neither a torchmetrics object logged "
            "under that name nor a ModelCheckpoint, EarlyStopping or scheduler that monitors it tells"
        )

    @property
    def remedy(self) -> str:
        """The arguments that say it."""
        return f'Set both: monitor="{self.name}", mode="max" (or mode="min").'


def watch(trainer: pl.Trainer, monitor: str | None, mode: str | None, natures: Natures) -> Watch:
    """Return which metric judges and which way: as given, else as the metric says, else as others watch it.

    Args:
        trainer: Its callbacks and schedulers may watch the same metric; without `monitor`, the one that
            ModelCheckpoint monitors is taken, or else "val_loss".
        monitor: The name given.
        mode: The mode given.
        natures: What is known of metrics that have been logged.
    """
    name = monitor or _checkpointed(trainer) or "val_loss"
    nature = nature_of(name, natures)
    own = None if nature is None or nature.higher is None else ("max" if nature.higher else "min")
    others = [] if mode else list(_watchers(trainer, name))
    if mode:
        found = Watch(name, mode, "as given")
    elif own and nature is not None:
        found = Watch(name, own, f"as {nature.kind} says")
    elif others:
        found = Watch(name, others[0][1], f"as {others[0][0]} watches it")
    elif is_loss(name):
        found = Watch(name, "min", "it is a loss")
    else:
        return Watch(name, None, "")
    against = (
        [f"{nature.kind} says that {WAYS[own]}"] if own and nature and own != found.mode else []
    )
    against += [f"{who} watches it by mode={way!r}" for who, way in others if way != found.mode]
    return Watch(name, found.mode, found.why, "; ".join(against))


def is_loss(name: str) -> bool:
    """Return whether a metric's name says that it is a loss.

    >>> is_loss("val/ce_loss"), is_loss("val_loss_epoch"), is_loss("val_acc"), is_loss("glossiness")
    (True, True, False, False)
    """
    return any(part in ("loss", "losses") for part in re.split(r"[^a-z]+", name.lower()))


def _checkpointed(trainer: pl.Trainer) -> str | None:
    kind = package_of(trainer).callbacks.ModelCheckpoint
    names = [c.monitor for c in trainer.checkpoint_callbacks if isinstance(c, kind)]
    return next((name for name in names if name is not None), None)


def _watchers(trainer: pl.Trainer, name: str) -> Iterator[tuple[str, str]]:
    """Yield who else watches a metric, and by which mode."""
    callbacks = package_of(trainer).callbacks
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (
            isinstance(callback, (callbacks.ModelCheckpoint, callbacks.EarlyStopping))
            and callback.monitor == name
        ):
            yield type(callback).__name__, callback.mode
    for config in trainer.strategy.lr_scheduler_configs:
        mode: Any = getattr(config.scheduler, "mode", None)
        if config.monitor == name and mode in WAYS:
            yield type(config.scheduler).__name__, mode
