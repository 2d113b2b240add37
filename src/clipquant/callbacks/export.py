"""Exports at the end of a fit: example and calibration from the Trainer's data, judged by its metric."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clipquant.callbacks.road.calibration import Found, Prepared, loop_on, run_prepared
from clipquant.callbacks.road.judge import judge, replaced
from clipquant.callbacks.road.road import Road
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
    road: Road,
    found: Found | None,
    quantized: QuantizedModel,
    formats: Sequence[str],
    folder: Path,
    *,
    max_drop: float | None,
) -> tuple[ExportRecord, ...]:
    """Write the exports; one that fails is a record that says why, never an error at fit end.

    Args:
        road: The road; its guest ends as it was.
        found: Batches that give the example and calibrate the ranges of activations.
        quantized: The quantized weights and what is known of them.
        formats: Of `FILES`.
        folder: Where the files go.
        max_drop: Most that int8 may lose of the monitored metric.
    """
    if not formats:
        return ()
    batches = [] if found is None else list(found.batches)
    try:
        example = find_call(road, found)
    except Exception as error:
        return tuple(ExportRecord(name, error=_why(error)) for name in formats)
    records = []
    for name in formats:
        try:
            record = _export(
                name, road, quantized, example, folder / FILES[name], batches, max_drop
            )
        except Exception as error:
            record = ExportRecord(name, error=_why(error))
        records.append(record)
    return tuple(records)


def find_call(road: Road, found: Found | None) -> Example:
    """Return a call that the guest's `forward` accepts.

    Raises:
        ExportError: If none can be found.
    """
    batches = [] if found is None else list(found.batches[:1])
    calls = _seen_calls(road, batches)
    road.guest._trainer = None
    road.guest.eval()
    return find_example(road.guest, batches[0] if batches else None, call=calls[0])


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, ExportError) else f"{type(error).__name__}: {error}"


def _export(
    name: str,
    road: Road,
    quantized: QuantizedModel,
    example: Example,
    path: Path,
    batches: Sequence[Any],
    max_drop: float | None,
) -> ExportRecord:
    module, weights = road.guest, quantized.weights
    if name != "onnx-int8":
        write = export_pt2 if name == "pt2" else export_onnx
        return write(module, weights, example, path)
    calls = [
        find_example(module, batch, own=False, call=call)
        for batch, call in zip(batches, _seen_calls(road, batches), strict=True)
    ]
    judge_forward = _judge(road, quantized.report)
    why = judge_forward if isinstance(judge_forward, str) else None
    record = export_onnx_int8(
        module, weights, example, path,
        calibration=calls,
        judge=None if isinstance(judge_forward, str) else judge_forward,
        max_drop=max_drop,
    )  # fmt: skip
    return record if why is None else replace(record, notes=(*record.notes, why))


def _seen_calls(road: Road, batches: Sequence[Any]) -> list[Example | None]:
    """Return what `validation_step` first calls forward with for each batch; None where it does not.

    What a step passes to forward is known for certain only by running it: a batch of two tensors may
    be inputs and targets, two inputs, or one input that is a pair.
    """
    found: list[Example | None] = [None] * max(len(batches), 1)
    if not batches or not road.has_step:
        return found
    own = road.guest.forward

    def visit(number: int, prepared: Prepared) -> None:
        calls: list[Example] = []

        def recorded(*args: Any, **kwargs: Any) -> Any:
            calls.append(Example(args, kwargs))
            return own(*args, **kwargs)

        with replaced(road.guest, recorded), torch.no_grad(), suppress(Exception):
            run_prepared(road.guest, prepared)
        found[number] = calls[0].map(_to_cpu) if calls else None

    loop_on(road)(batches, range(len(batches)), visit)
    return found


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu()


def _judge(
    road: Road, report: QuantizationReport
) -> Callable[[Forward], Judgement] | str:
    """Return a judge by the monitored metric, or why there is none that forward decides."""
    monitor = report.monitor
    if monitor is None or monitor not in report.float_metrics:
        return "no validation metric is monitored"
    called = _measure(road, road.guest.forward)[1]
    if not called:
        return (
            "validation_step does not call self(...) or self.forward(...), in whose place the exported "
            "file would run"
        )

    def judge_forward(forward: Forward) -> Judgement:
        metrics, _ = _measure(road, forward)
        worse = metrics[monitor] - report.float_metrics[monitor]
        return Judgement(-worse if report.mode == "max" else worse, metrics)

    return judge_forward


def _measure(road: Road, forward: Forward) -> tuple[dict[str, float], bool]:
    """Return the validation metrics with `forward` in the place of the module's, and if it was used."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    return judge(road, forward=counted), bool(calls)
