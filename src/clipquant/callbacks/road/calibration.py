"""Calibration on the road: one loop over batches, each given to a visitor while the nested loop holds it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from clipquant.callbacks.road.data import (
    Listed,
    Mode,
    batches_of,
    kept_generators,
    several_loaders,
    validation_loaders,
)
from clipquant.callbacks.road.judge import watched
from clipquant.callbacks.road.precision import PLAIN, Precision
from clipquant.callbacks.road.road import Road
from clipquant.errors import RunError
from clipquant.quant.network.calibration import EndLoop, Visit
from clipquant.quant.network.layers import weights_of
from clipquant.quant.network.state import kept, seeded


@dataclass(frozen=True)
class Prepared:
    """A batch as Lightning's loop has prepared it, and the step that takes it.

    Args:
        step: The guest's own `validation_step`, or its `forward` where there is none.
        args: What the step gets.
        number: Of the batch, which seeds what the step draws.
        precision: In which the loop runs steps.
    """

    step: Callable[..., Any]
    args: tuple[Any, ...]
    number: int
    precision: Precision


def run_prepared(guest: nn.Module, prepared: Prepared) -> Any:
    """Run the guest's step on a prepared batch: from the same state and on the same noise each time."""
    with kept(guest), seeded(prepared.number), prepared.precision.active():
        return prepared.step(*prepared.args)


def loop_on(road: Road) -> Callable[[Sequence[Any], Sequence[int], Visit], None]:
    """Return what goes over batches in an order and gives each to a visitor, in one nested validation."""

    def loop(batches: Sequence[Any], order: Sequence[int], visit: Visit) -> None:
        order = list(order)
        listed = Listed(batches, order)

        def step(place: int, own: Callable[..., Any], args: tuple[Any, ...]) -> None:
            if listed.ended:
                return
            precision = Precision.now(road.trainer.strategy.root_device.type)
            try:
                with PLAIN.active():  # a visitor's own sums are not the user's step
                    visit(order[place], Prepared(own, args, order[place], precision))
            except EndLoop:
                listed.ended = True

        further = [Listed((), ()) for _ in range(several_loaders(road) - 1)]
        road.run([listed, *further] if further else listed, step, hooks=not road.before)

    return loop


@dataclass(frozen=True)
class Source:
    """Where calibration batches come from.

    Args:
        what: In words.
        stage: "train" or "val".
        mode: How several dataloaders are taken together.
    """

    what: str
    stage: str
    mode: Mode

    def batches(self, road: Road, count: int) -> list[Any]:
        """Return the first batches, the same each time."""
        return batches_of(road, self.stage, count, self.mode)


SOURCES = (
    Source("the train dataloader", "train", "max_size_cycle"),
    Source("the train dataloaders, one after the other", "train", "sequential"),
    Source("the validation dataloader", "val", "sequential"),
)


@dataclass(frozen=True)
class Found:
    """Calibration batches that the guest's step takes.

    Args:
        batches: The batches, as the loader gives them.
        what: Where they come from, in words.
        refused: Why sources before it would not do.
        plain: Whether they are given to `forward`, since `validation_step` runs no layer.
    """

    batches: Sequence[Any]
    what: str
    refused: tuple[str, ...] = ()
    plain: bool = False

    def on(self, road: Road) -> Road:
        """Return the road on which the batches run."""
        return replace(road, plain=self.plain)


def find_batches(road: Road, count: int) -> Found:
    """Return calibration batches of the first source whose batches the guest's step takes.

    The step is the `validation_step`, which may want another form of batch than `training_step` does.

    Args:
        road: The road.
        count: How many batches at most.

    Raises:
        CalibrationError: If no source has any that run; says why for each.
    """
    refused: list[str] = []
    for plain in (False, True) if road.has_step else (False,):
        for source in SOURCES:
            found = _found(replace(road, plain=plain), source, count, refused)
            if found is not None:
                return found
    raise CalibrationError("; ".join(dict.fromkeys(refused)))


def _found(road: Road, source: Source, count: int, refused: list[str]) -> Found | None:
    """Return a source's batches where they run layers of the guest; else None, and why."""
    try:
        batches = source.batches(road, count)
        if not batches:
            refused.append(f"{source.what} gave no batch")
            return None
        try_batches(road, batches)
    except Exception as error:  # whatever a user's step or loader raises
        refused.append(f"{source.what}: {type(error).__name__}: {error}")
        return None
    what = f"{len(batches)} batches of {source.what}{' through forward' if road.plain else ''}"
    return Found(batches, what, tuple(refused), road.plain)


def probe(road: Road, batches: Sequence[Any] | None = None) -> Any:
    """Return what a guest gives on one batch, of validation or else of training: figures, and every part's outputs.

    None where there is nothing to run it on.

    Args:
        road: The road.
        batches: Of training, as they are at hand; None: asked of the road.
    """
    loaders = validation_loaders(road)
    with watched(road.guest) as seen:
        if loaders is not None:
            with kept_generators(road, loaders):
                return [road.run(loaders, limit=1), seen]
        given = SOURCES[0].batches(road, 1) if batches is None else batches
        if not given:
            return None
        try_batches(road, given)
        return [seen]


class CalibrationError(RunError):
    """No batch could be run, and why."""


def try_batches(road: Road, batches: Sequence[Any]) -> None:
    """Run the guest's step on the first of some batches; raises what it raises, or where it runs no layer."""
    with watched(road.guest) as seen:
        loop_on(road)(batches, [0], lambda _, prepared: run_prepared(road.guest, prepared))
    if not seen and next(weights_of(road.guest), None) is not None:
        raise CalibrationError("the step runs no layer of the module")
