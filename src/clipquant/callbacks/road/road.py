"""The one road: user code runs through a nested Trainer's own loop, seeded, silent, and leaves no trace."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.lightning import is_overridden
from clipquant.callbacks.road.guest import guest_of
from clipquant.callbacks.road.logged import Nature, natures_of
from clipquant.callbacks.road.nested import nested_trainer
from clipquant.callbacks.road.parts import Recorder
from clipquant.callbacks.road.ranks import alone
from clipquant.callbacks.road.silence import Silence, silently
from clipquant.quant.network.calibration import Progress, call_model
from clipquant.quant.network.state import kept, seeded

# What a step does: its place in the loop, the step itself and the arguments that Lightning has prepared.
Step = Callable[[int, Callable[..., Any], tuple[Any, ...]], Any]

_TRANSFERS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
_ENDS = ("on_validation_batch_end", "on_validation_epoch_end", "on_validation_end")


@dataclass(frozen=True)
class Road:
    """The way on which a module's own steps are run aside.

    Args:
        trainer: The outer Trainer.
        guest: What is run.
        silence: Its loggers' stand-ins.
        before: Whether it is used before training: then no loader is asked for anew, and batches are
            those that the Trainer has prepared already.
        plain: Whether batches are given to `forward` though there is a `validation_step`.
        natures: What the metrics that were logged on it say of themselves.
        tell: Told what is being done, the steps done and the steps in all.
    """

    trainer: pl.Trainer
    guest: pl.LightningModule
    silence: Silence
    before: bool = False
    plain: bool = False
    natures: dict[str, Nature] = field(default_factory=dict)
    tell: Progress | None = None

    @property
    def has_step(self) -> bool:
        """Whether there is a `validation_step` of the user's own."""
        return is_overridden("validation_step", self.guest)

    @property
    def by_step(self) -> bool:
        """Whether a batch is given to that step, not to `forward`."""
        return self.has_step and not self.plain

    def run(
        self,
        loaders: Any,
        step: Step | None = None,
        *,
        limit: Any = 1.0,
        what: str = "",
        hooks: bool = True,
        recorder: Recorder | None = None,
    ) -> dict[str, float]:
        """Return what a validation of the guest logs.

        Args:
            loaders: As `Trainer.validate` takes them.
            step: What is done with each batch, in the place of the step alone; then nothing is logged,
                and what the module does at the end of batches and epochs is left out.
            limit: As `limit_val_batches`.
            what: What is being done, told before each batch; empty: nothing is told.
            hooks: Whether batches go through the hooks of transfer; those that did so already do not.
            recorder: Told what each step has logged.
        """
        with ExitStack() as stack:
            stack.enter_context(seeded(0))
            stack.enter_context(self.silence.quiet())
            stack.enter_context(alone())
            stack.enter_context(kept(self.guest))
            trainers: list[pl.Trainer] = []
            after = self._noting(recorder, trainers)
            self._lay_(step, hooks, self._counter(what, trainers), after)
            inner = stack.enter_context(
                nested_trainer(self.trainer, self.silence, limit=limit, hooks=hooks)
            )
            trainers.append(inner)
            inner.validate(self.guest, dataloaders=loaders, verbose=False)
            self.natures.update(natures_of(inner))
            metrics = {name: float(value) for name, value in inner.callback_metrics.items()}
            if recorder is not None:
                recorder.end_(metrics, inner.num_val_batches)
            return metrics

    def _noting(
        self, recorder: Recorder | None, trainers: list[pl.Trainer]
    ) -> Callable[[int, Any], None]:
        """Return what shows a recorder, after each step, what has been logged so far."""

        def note(number: int, batch: Any) -> None:
            if recorder is not None:
                results = getattr(trainers[-1].validate_loop, "_results", None)
                recorder.note_(results, number, batch)

        return note

    def _counter(self, what: str, trainers: list[pl.Trainer]) -> Callable[[int], None]:
        """Return what tells, before each batch, how many are done of how many."""

        def count(number: int) -> None:
            if self.tell is not None and what:
                batches = sum(trainers[-1].num_val_batches)
                self.tell(what, number, int(batches) if math.isfinite(batches) else number + 1)

        return count

    def _lay_(
        self,
        step: Step | None,
        hooks: bool,
        count: Callable[[int], None],
        note: Callable[[int, Any], None],
    ) -> None:
        """Put what is done with a batch in the place of the guest's `validation_step`."""
        guest = self.guest
        own = silently(guest.validation_step if self.by_step else functools.partial(_call, guest))
        if step is None:
            step = _seeded_step
        else:
            guest.log = guest.log_dict = _ignore  # type: ignore[method-assign]
            for name in _ENDS:
                setattr(guest, name, _ignore)
        if not hooks:
            for name in _TRANSFERS:
                setattr(guest, name, _same)
        number = iter(range(1 << 62))

        def validation_step(*args: Any) -> Any:
            place = next(number)
            count(place)
            returned = step(place, own, args)
            note(place, args[0] if args else None)
            return returned

        if self.has_step:
            functools.update_wrapper(validation_step, own)
        guest.validation_step = validation_step  # type: ignore[method-assign]


@contextmanager
def open_road(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    probe: Callable[[Road], Any],
    *,
    before: bool = False,
    tell: Progress | None = None,
) -> Iterator[Road]:
    """Yield the road of a module: on an independent copy, or on itself, put back at the end.

    Args:
        trainer: The outer Trainer.
        module: Its module, which ends as it was.
        probe: Runs a road for a batch or so and returns what it gave, to prove a copy independent.
        before: Whether it is used before training.
        tell: Told what is being done.
    """
    silence = Silence(trainer)

    def run(guest: Any) -> Any:
        return probe(Road(trainer, guest, silence, before))

    with guest_of(module, silence, run) as guest:
        yield Road(trainer, guest, silence, before, tell=tell)


def _seeded_step(number: int, step: Callable[..., Any], args: Sequence[Any]) -> Any:
    """Run a step on the same noise each time, and leave the loader's own draws alone."""
    with seeded(number):
        return step(*args)


def _call(guest: pl.LightningModule, batch: Any, *_: Any) -> Any:
    return call_model(guest, batch)


def _same(batch: Any, *_: Any) -> Any:
    return batch


def _ignore(*_: Any, **__: Any) -> None:
    return None
