"""Steps that may fail after training: each has a fallback, and what failed is told once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import lightning.pytorch as pl

from clipquant.callbacks.telling import warn
from clipquant.errors import RunError

_log = logging.getLogger("clipquant")


class QuantizationError(RunError):
    """A step after training failed, and on_fail="raise" asks to be told by an exception."""


@dataclass(frozen=True)
class Failure:
    """One step that failed.

    Args:
        step: What was tried.
        error: What was raised.
        instead: What happens instead.
        remedy: What the user can do.
        fatal: Whether what was asked for cannot come about at all, so that training is not worth it.
    """

    step: str
    error: str
    instead: str
    remedy: str
    fatal: bool = False

    def __str__(self) -> str:
        return f"{self.step} failed ({self.error}); {self.instead}. {self.remedy}"


@dataclass
class Failures:
    """The steps that failed so far.

    Args:
        prefix: Begins each warning.
        told_before: Steps that the user has been warned of already.
    """

    prefix: str = "QuantizeOnFitEnd: "
    items: list[Failure] = field(default_factory=list)
    told_before: frozenset[str] = frozenset()

    @contextmanager
    def step(self, what: str, instead: str, remedy: str) -> Iterator[None]:
        """Go on after a step that raises, and warn of it.

        >>> import warnings
        >>> failures = Failures()
        >>> with warnings.catch_warnings(record=True), failures.step("counting", "0 is taken", "Count again."):
        ...     raise ValueError("no fingers")
        >>> print(*failures.told())
        counting failed (ValueError: no fingers); 0 is taken. Count again.
        """
        try:
            yield
        except Exception as error:  # whatever user code, a full disk or a library raises
            self.add_(Failure(what, f"{type(error).__name__}: {error}", instead, remedy))

    def add_(self, failure: Failure) -> None:
        """Add a failure, and warn of it the first time; one that is fatal is raised by whoever asked."""
        self.items.append(failure)
        if not failure.fatal and failure.step not in self.told_before:
            warn(f"{self.prefix}{failure}")

    def told(self) -> tuple[str, ...]:
        """Return the failures in words."""
        return tuple(map(str, self.items))


def tell_rank(trainer: pl.Trainer, failures: Sequence[Failure], seconds: float) -> None:
    """Let every one of several processes say what failed: each may write to a log of its own.

    Args:
        trainer: Tells the process.
        failures: What failed in the first process, whose result is everybody's.
        seconds: How long this process waited for the others.
    """
    if failures:
        said = "; ".join(map(str, failures))
        place = f"rank {trainer.global_rank} of {trainer.world_size}"
        _log.warning("%s: %s It waited %.0f s for the others.", place, said, seconds)
