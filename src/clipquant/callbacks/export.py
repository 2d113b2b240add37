"""Exports at the end of a fit: example and calibration from the Trainer's data, judged by its metric."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from clipquant.callbacks.calibration import step_forward
from clipquant.callbacks.data import train_batches
from clipquant.callbacks.evaluate import judge
from clipquant.callbacks.guest import copy_module
from clipquant.errors import ArgumentError
from clipquant.export import (
    Example,
    ExportError,
    ExportRecord,
    Format,
    Judgement,
    Subject,
    find_example,
)
from clipquant.export.formats import as_format, known_names
from clipquant.export.parts.subject import Forward, Judge
from clipquant.model import QuantizedModel
from clipquant.report.record import QuantizationReport


def check_formats(
    asked: Sequence[str | Format] | None, calibration_batches: int
) -> tuple[Format, ...]:
    """Return the formats to export, or raise for one that cannot be.

    >>> check_formats(["tflite"], 16)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: export must be a list of 'pt2', 'onnx', 'onnx-int8', 'compressed-tensors'; \
got ['tflite'].
    """
    try:
        if isinstance(asked, str):
            raise ArgumentError
        formats = tuple(dict.fromkeys(as_format(given) for given in asked or ()))
    except ArgumentError:
        raise ArgumentError(f"export must be a list of {known_names()}; got {asked!r}.") from None
    for chosen in formats:
        if chosen.calibrates and calibration_batches < 1:
            raise ArgumentError(
                f"export={chosen.name!r} calibrates the ranges of activations; got calibration_batches=0. "
                "Set it to 1 or more, or export 'onnx'."
            )
    return formats


def check_installed(formats: Sequence[Format]) -> None:
    """Raise before any training if a package that a format takes is missing."""
    for chosen in formats:
        chosen.require()


def export_files(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    quantized: QuantizedModel,
    formats: Sequence[Format],
    folder: Path,
    *,
    calibration_batches: int,
    max_drop: float | None,
) -> tuple[ExportRecord, ...]:
    """Write the exports; one that fails is a record that says why, never an error at fit end.

    Args:
        trainer: The Trainer that has fitted; gives the data and the metric.
        module: Detached from it, on the CPU; not touched.
        quantized: The quantized weights and what is known of them.
        formats: What to write.
        folder: Where the files go.
        calibration_batches: Train batches that calibrate the ranges of activations.
        max_drop: Most that int8 may lose of the monitored metric.
    """
    source = _Source(trainer, module, quantized, calibration_batches, max_drop)
    return tuple(_export(chosen, source, folder / chosen.file) for chosen in formats)


def _export(chosen: Format, source: _Source, path: Path) -> ExportRecord:
    """Return the record of one format's file; of why there is none, where there is none."""
    try:
        subject, unjudged = source.subject(chosen)
        record = chosen.write(subject, path)
    except Exception as error:  # a model, its data and an exporter may raise anything
        said = str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"
        return ExportRecord(chosen.name, error=said)
    return replace(record, notes=(*record.notes, unjudged)) if unjudged else record


@dataclass(frozen=True)
class _Source:
    """What the subjects of all exports of one fit are made from, each part once and only where it is needed."""

    trainer: pl.Trainer
    module: pl.LightningModule
    quantized: QuantizedModel
    calibration_batches: int
    max_drop: float | None

    def subject(self, chosen: Format) -> tuple[Subject, str]:
        """Return what a format is given, and why it has no judge where it could use one."""
        weights = self.quantized.weights
        if not chosen.traces:
            return Subject(weights), ""
        traced = Subject(weights, self.copy, self.example)
        if not chosen.calibrates:
            return traced, ""
        calls = [
            find_example(
                self.copy, batch, own=False, call=_seen_call(self.trainer, self.copy, batch)
            )
            for batch in islice(train_batches(self.trainer), self.calibration_batches)
        ]
        judge_forward, unjudged = _judge(self.trainer, self.copy, self.quantized.report)
        return (
            replace(traced, calibration=calls, judge=judge_forward, max_drop=self.max_drop),
            unjudged,
        )

    @cached_property
    def copy(self) -> pl.LightningModule:
        return copy_module(self.module).eval()

    @cached_property
    def example(self) -> Example:
        batch = next(train_batches(self.trainer), None)
        return find_example(self.copy, batch, call=_seen_call(self.trainer, self.copy, batch))


def _seen_call(trainer: pl.Trainer, module: pl.LightningModule, batch: Any) -> Example | None:
    """Return what `validation_step` first calls forward with for a batch; None where it does not.

    What a step passes to forward is known for certain only by running it: a batch of two tensors may
    be inputs and targets, two inputs, or one input that is a pair.
    """
    if batch is None or not is_overridden("validation_step", module, pl.LightningModule):
        return None
    calls: list[Example] = []

    def recorded(*args: Any, **kwargs: Any) -> Any:
        calls.append(Example(args, kwargs))
        return module.forward(*args, **kwargs)

    guest = copy_module(module)
    guest.forward = recorded  # type: ignore[method-assign]
    # A step that fails here ran in the fit, so it needs more than this; forward may be reached even so.
    with isolate_rng(), torch.no_grad(), suppress(Exception):
        step_forward(trainer, guest)(guest, batch)
    return calls[0] if calls else None


def _judge(
    trainer: pl.Trainer, module: pl.LightningModule, report: QuantizationReport
) -> tuple[Judge | None, str]:
    """Return a judge by the monitored metric; without one, why there is none that forward decides."""
    monitor = report.monitor
    if monitor is None or monitor not in report.float_metrics:
        return None, "no validation metric is monitored"
    called = _metrics_with(trainer, module, module.forward)[1]
    if not called:
        return None, (
            "validation_step does not call self(...) or self.forward(...), in whose place the exported "
            "file would run"
        )

    def judge_forward(forward: Forward) -> Judgement:
        metrics, _ = _metrics_with(trainer, module, forward)
        worse = metrics[monitor] - report.float_metrics[monitor]
        return Judgement(-worse if report.mode == "max" else worse, metrics)

    return judge_forward, ""


def _metrics_with(
    trainer: pl.Trainer, module: pl.LightningModule, forward: Forward
) -> tuple[dict[str, float], bool]:
    """Return the validation metrics with `forward` in the place of the module's, and if it was used."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    guest = copy_module(module)
    guest.forward = counted  # type: ignore[method-assign]
    return judge(trainer, guest), bool(calls)
