"""What a callback found in a process that a Trainer has started, brought back to the process that started it."""

from __future__ import annotations

from functools import partial
from typing import Any
from uuid import uuid4
from weakref import WeakValueDictionary

import lightning.pytorch as pl

_LIVING: WeakValueDictionary[str, Any] = WeakValueDictionary()


def register(callback: Any) -> str:
    """Return a token by which a callback is found again in this process, and in those forked from it."""
    token = uuid4().hex
    _LIVING[token] = callback
    return token


class Parcel:
    """Attributes for the callback of a token; they arrive when the parcel is unpickled in its process.

    Args:
        token: As `register` gave it.
        attributes: Name -> value.
    """

    def __init__(self, token: str, attributes: dict[str, Any]) -> None:
        self.token, self.attributes = token, attributes

    def __reduce__(self) -> tuple[Any, ...]:
        return _deliver, (self.token, self.attributes)


def _deliver(token: str, attributes: dict[str, Any]) -> Parcel:
    callback = _LIVING.get(token)
    if callback is not None:
        vars(callback).update(attributes)
    return Parcel(token, attributes)


def hand_over(callback: Any, parcel: Parcel) -> None:
    """Give a parcel's attributes to the callback that `callback` is a copy of.

    A library may copy its callbacks before it fits; the user holds the first one, which has seen no fit.
    """
    first = _LIVING.get(parcel.token)
    if first is not None and first is not callback and not first.used:
        vars(first).update(parcel.attributes)


def send_back(trainer: pl.Trainer, parcel: Parcel) -> None:
    """Let a parcel travel with what a launcher that spawns or forks brings back from its first process."""
    launcher = trainer.strategy.launcher
    extra = getattr(launcher, "get_extra_results", None)
    if extra is not None:
        launcher.get_extra_results = partial(_with_parcel, extra, parcel)  # type: ignore[union-attr]


def _with_parcel(extra: Any, parcel: Parcel, trainer: pl.Trainer) -> dict[str, Any]:
    return {**extra(trainer), f"clipquant-{parcel.token}": parcel}
