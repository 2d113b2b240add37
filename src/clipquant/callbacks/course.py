"""How far a fit has come, as a share of the whole."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl

from clipquant.errors import ArgumentError


def share_done(trainer: pl.Trainer) -> float | None:
    """Return the share of a fit that is done, 0 to 1; None where its length is not known.

    The fit ends at `max_steps` or at `max_epochs`, whichever comes first. A dry run (`fast_dev_run`)
    counts as done, so that whatever begins late is run by it.
    """
    if getattr(trainer, "fast_dev_run", False):
        return 1.0
    shares = []
    if trainer.max_steps is not None and trainer.max_steps >= 0:
        shares.append(trainer.global_step / max(trainer.max_steps, 1))
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is not None and epochs >= 0:
        loop = trainer.fit_loop.epoch_loop
        done = loop.batch_progress.current.completed / batches if 0 < batches < math.inf else 0.0
        if math.isfinite(batches) or epochs > 1:
            shares.append((trainer.current_epoch + min(done, 1.0)) / max(epochs, 1))
    return max(shares) if shares else None


def check_course(trainer: pl.Trainer, name: str, value: float) -> None:
    """Raise where something begins or ends at a share of a fit whose length nobody knows.

    Args:
        trainer: The Trainer, about to fit.
        name: The argument that is a share of the fit.
        value: Its value; 0 needs no length.
    """
    bounded = any(
        limit is not None and limit >= 0 for limit in (trainer.max_steps, trainer.max_epochs)
    )
    if value > 0 and not bounded:
        raise ArgumentError(
            f"{name} is a share of the fit, whose length must be known; got {name}={value!r} with max_epochs=-1 and no "
            f"max_steps. Set one of them, or {name}=0."
        )


def check_same(what: str, asked: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Raise where a fit would go on with other settings than its checkpoint was written with.

    Args:
        what: What goes on and whose settings they are, as in "the masks of its checkpoint: SparsifyWeights".
        asked: Name of a setting -> its value now.
        before: The same in the checkpoint.
    """
    for key, value in before.items():
        if value != asked[key]:
            raise ArgumentError(
                f"a fit goes on with {what} had {key}={value!r} there, and has {key}={asked[key]!r} now. Give it the "
                "same, or start from the weights alone (load_from_checkpoint)."
            )


def as_share(name: str, value: Any) -> float:
    """Return a number from 0 to 1, or raise.

    >>> as_share("start", 1.5)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: start is a share of the fit, from 0 (its beginning) to 1 (its end); got 1.5.
    """
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise ArgumentError(
            f"{name} is a share of the fit, from 0 (its beginning) to 1 (its end); got {value!r}."
        )
    return float(value)
