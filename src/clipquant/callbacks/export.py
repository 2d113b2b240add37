"""Exports at the end of a fit: example and calibration from the Trainer's data, judged by its metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
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
from clipquant.export import (
    Example,
    ExportError,
    ExportRecord,
    Judgement,
    export_onnx,
    export_onnx_int8,
    export_pt2,
    find_example,
    require_onnx,
)
from clipquant.export.onnx_int8 import Forward
from clipquant.model import QuantizedModel
from clipquant.report.record import QuantizationReport

FILES = {"pt2": "model.pt2", "onnx": "model.onnx", "onnx-int8": "model.int8.onnx"}


def check_formats(formats: Sequence[str] | None, calibration_batches: int) -> tuple[str, ...]:
    """Return the formats to export, or raise for one that cannot be.

    >>> check_formats(["tflite"], 16)
    Traceback (most recent call last):
    ...
    ValueError: export must be a list of 'pt2', 'onnx', 'onnx-int8'; got ['tflite'].
    """
    if isinstance(formats, str) or not set(formats or ()) <= set(FILES):
        known = ", ".join(map(repr, FILES))
        raise ValueError(f"export must be a list of {known}; got {formats!r}.")
    if "onnx-int8" in (formats or ()) and calibration_batches < 1:
        raise ValueError(
            "export='onnx-int8' calibrates the ranges of activations; got calibration_batches=0. "
            "Set it to 1 or more, or export 'onnx'."
        )
    return tuple(dict.fromkeys(formats or ()))


def check_installed(formats: Sequence[str]) -> None:
    """Raise before any training if a library that a format takes is missing."""
    if any(name.startswith("onnx") for name in formats):
        require_onnx()


def export_files(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    quantized: QuantizedModel,
    formats: Sequence[str],
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
        formats: Of `FILES`.
        folder: Where the files go.
        calibration_batches: Train batches that calibrate the ranges of activations.
        max_drop: Most that int8 may lose of the monitored metric.
    """
    if not formats:
        return ()
    try:
        module = copy_module(module).eval()
        batch = next(train_batches(trainer), None)
        example = find_example(module, batch, call=_seen_call(trainer, module, batch))
    except Exception as error:
        return tuple(ExportRecord(name, error=_why(error)) for name in formats)
    records = []
    for name in formats:
        try:
            record = _export(
                name, trainer, module, quantized, example, folder / FILES[name],
                calibration_batches, max_drop,
            )  # fmt: skip
        except Exception as error:
            record = ExportRecord(name, error=_why(error))
        records.append(record)
    return tuple(records)


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"


def _export(
    name: str,
    trainer: pl.Trainer,
    module: pl.LightningModule,
    quantized: QuantizedModel,
    example: Example,
    path: Path,
    calibration_batches: int,
    max_drop: float | None,
) -> ExportRecord:
    weights = quantized.weights
    if name != "onnx-int8":
        write = export_pt2 if name == "pt2" else export_onnx
        return write(module, weights, example, path)
    batches = islice(train_batches(trainer), calibration_batches)
    calls = [
        find_example(module, batch, own=False, call=_seen_call(trainer, module, batch))
        for batch in batches
    ]
    judge_forward = _judge(trainer, module, quantized.report)
    why = judge_forward if isinstance(judge_forward, str) else None
    record = export_onnx_int8(
        module, weights, example, path,
        calibration=calls,
        judge=None if isinstance(judge_forward, str) else judge_forward,
        max_drop=max_drop,
    )  # fmt: skip
    return record if why is None else replace(record, notes=(*record.notes, why))


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
) -> Callable[[Forward], Judgement] | str:
    """Return a judge by the monitored metric, or why there is none that forward decides."""
    monitor = report.monitor
    if monitor is None or monitor not in report.float_metrics:
        return "no validation metric is monitored"
    called = _measure(trainer, module, module.forward)[1]
    if not called:
        return (
            "validation_step does not call self(...) or self.forward(...), in whose place the exported "
            "file would run"
        )

    def judge_forward(forward: Forward) -> Judgement:
        metrics, _ = _measure(trainer, module, forward)
        worse = metrics[monitor] - report.float_metrics[monitor]
        return Judgement(-worse if report.mode == "max" else worse, metrics)

    return judge_forward


def _measure(
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
