"""One batch goes the whole road before the first step is trained: what would fail after training is told now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from clipquant.callbacks.auto import sensitivities
from clipquant.callbacks.checkpoint import logged_name
from clipquant.callbacks.export import find_call
from clipquant.callbacks.failures import Failure, Failures
from clipquant.callbacks.road.calibration import Found, loop_on, probe, run_prepared, try_batches
from clipquant.callbacks.road.data import validation_loaders
from clipquant.callbacks.road.judge import judge
from clipquant.callbacks.road.logged import Nature, Natures, nature_of
from clipquant.callbacks.road.road import Road, open_road
from clipquant.callbacks.settings import Settings
from clipquant.callbacks.watch import WAYS, Watch
from clipquant.errors import ArgumentError
from clipquant.model.entry import quantize_by
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import Target
from clipquant.quant.network.state import kept, seeded

FINDING = "finding the monitored metric"

Judged = tuple[Natures, Mapping[str, float]]


def rehearse(
    settings: Settings, trainer: pl.Trainer, module: pl.LightningModule, batch: Any
) -> tuple[Failure, ...]:
    """Return what would fail after training, found out on one batch; nothing is left of it.

    Args:
        settings: What the callback was asked.
        trainer: The Trainer, about to train its first batch.
        module: Its module, which ends as it was.
        batch: That batch, as the Trainer has prepared it.
    """
    failures = Failures("Rehearsal of QuantizeOnFitEnd, before training: ")
    if not is_built(module):  # not before the first step
        return tuple(_unknown(settings, trainer, {}))
    found = Found([batch], "the first train batch") if batch is not None else None

    judged: Judged = ({}, {})

    with (
        failures.step(
            "running the module aside",
            "the weights will be quantized without data and not be judged",
            "Set num_sanity_val_steps=0 to leave the rehearsal out.",
        ),
        open_road(
            trainer,
            module,
            lambda road: probe(road, [] if found is None else found.batches),
            before=True,
        ) as road,
    ):
        judged = _judge_(road, settings, failures)
        if found is not None:
            _calibrate_(road, settings, found, failures)
            _export_(road, settings, found, failures)
    failures.items.extend(_unknown(settings, trainer, *judged))
    return tuple(failures.items)


def _unknown(
    settings: Settings,
    trainer: pl.Trainer,
    natures: Natures,
    metrics: Mapping[str, float] | None = None,
) -> Iterator[Failure]:
    """Yield that nobody has said which way the metric is better, where it will judge."""
    by = settings.watch(trainer, natures)
    logged = not metrics or logged_name(by.name, metrics) in metrics
    if by.mode is None and trainer.enable_validation and logged:
        yield Failure("judging", by.unknown, "", by.remedy, fatal=True)


def check_mode(settings: Settings, trainer: pl.Trainer) -> None:
    """Raise where nobody has said which way the metric is better, and no rehearsal will find it out.

    Raises:
        ArgumentError: Naming both arguments.
    """
    for failure in _unknown(settings, trainer, {}):
        raise ArgumentError(
            f"{failure.error} (num_sanity_val_steps=0 leaves out the rehearsal that would ask it). {failure.remedy}"
        )


def _judge_(road: Road, settings: Settings, failures: Failures) -> Judged:
    """Return what one validation batch logs, and what the logged metrics say of themselves."""
    metrics: Mapping[str, float] | None = None
    with failures.step(
        "judging by one validation batch",
        "the report will have no metrics, and a max_drop cannot be kept",
        "Run trainer.validate(module) to see the error by itself.",
    ):
        metrics = judge(road, limit=1)
    if metrics:
        _watch_(road, settings, failures, metrics)
    return road.natures, metrics or {}


def _watch_(
    road: Road, settings: Settings, failures: Failures, metrics: Mapping[str, float]
) -> None:
    """Add what is wrong with the metric that shall judge: it is not logged, or cannot lose what it may lose."""
    by = settings.watch(road.trainer, road.natures)
    monitor, name = by.name, logged_name(by.name, metrics)
    if by.conflict and name in metrics:
        failures.add_(
            Failure(
                f"telling which way {monitor!r} is better",
                by.conflict,
                f"{WAYS[by.mode or 'min']} is taken, {by.why}",
                by.remedy,
            )
        )
    if name in metrics:
        for failure in _too_much(settings, by, metrics[name], nature_of(name, road.natures)):
            failures.add_(failure)
        return
    if not settings.judges(road.trainer):
        return
    logged = f"validation does not log; logged are {', '.join(sorted(metrics))}"
    if settings.max_drop is not None:
        failures.add_(
            Failure(
                "keeping max_drop",
                f"it watches {monitor!r}, which {logged}",
                "no budget could be kept",
                "Set monitor to one of them.",
                fatal=True,
            )
        )
    else:
        failures.add_(
            Failure(
                FINDING,
                f"it is {monitor!r}, which {logged}",
                "the report will name no monitored metric",
                "Set monitor to one of them.",
            )
        )


def _too_much(
    settings: Settings, by: Watch, value: float, nature: Nature | None
) -> Iterator[Failure]:
    """Yield that a metric between 0 and 1 cannot lose as much as it may."""
    most = None if nature is None else nature.most
    if settings.max_drop is None or by.mode != "max" or settings.max_drop < 1:
        return
    if most == 1 or (most is None and 0 < value <= 1):
        yield Failure(
            "judging",
            f"max_drop={settings.max_drop:g} is in the units of {by.name!r}, which is at most 1 (now {value:.3g}), so "
            "that no file could miss it",
            "every size is held for good enough",
            f"For {settings.max_drop:g} points of a hundred write max_drop={settings.max_drop / 100:g}.",
            fatal=most == 1,
        )


def _calibrate_(road: Road, settings: Settings, found: Found, failures: Failures) -> None:
    """Quantize the smallest weight by the batch, and take its sensitivity where budgets need it."""
    if not settings.wants_data(road.guest):
        return
    targets = settings.recipe.select(road.guest).targets
    try:
        try_batches(road, found.batches)
    except Exception as error:  # whatever the step raises on a batch of another form
        if validation_loaders(road) is None:
            failures.add_(
                Failure(
                    "calibrating on a train batch",
                    f"{type(error).__name__}: {error}",
                    "the weights will be quantized without data",
                    "Let validation_step take batches of the train dataloader, give the Trainer validation data, "
                    "or set calibration_batches=0.",
                )
            )
        return
    with (
        failures.step(
            "calibrating one layer on one batch",
            "the weights will be quantized without data",
            "Set calibration_batches=0 to ask for that.",
        ),
        kept(road.guest, parameters=True),
        seeded(0),
    ):
        if settings.auto:
            sensitivities(road, targets, found)
        _quantize_one(road, settings, found, _smallest(targets))


def _quantize_one(road: Road, settings: Settings, found: Found, target: Target) -> None:
    recipe = replace(settings.recipe, include=[target.name], exclude=None, overrides=None)
    calibration = Calibration(found.batches, run_prepared, loop=loop_on(road))
    quantize_by(recipe, road.guest, calibration)


def _export_(road: Road, settings: Settings, found: Found, failures: Failures) -> None:
    if not settings.export:
        return
    with (
        failures.step(
            f"finding an example for {', '.join(chosen.name for chosen in settings.export)}",
            "the exports will fail, the artifact will not",
            "Set self.example_input_array in the module.",
        ),
        kept(road.guest),
        seeded(0),
        torch.no_grad(),
    ):
        find_call(road, found)


def _smallest(targets: tuple[Target, ...]) -> Target:
    return min(targets, key=lambda target: target.weight.numel())


def is_built(module: nn.Module) -> bool:
    """Return whether every lazy layer of a module has its shape.

    >>> is_built(nn.LazyLinear(2))
    False
    """
    return not any(is_lazy(parameter) for parameter in module.parameters())
