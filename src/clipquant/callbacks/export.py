"""Exports at the end of a fit: example and calibration from the Trainer's data, judged by its metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from clipquant.callbacks.road.calibration import Found, Prepared, loop_on, run_prepared
from clipquant.callbacks.road.judge import judge, replaced
from clipquant.callbacks.road.road import Road
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
    clipquant.errors.ArgumentError: export must be a list of 'pt2', 'onnx', 'onnx-int8', 'onnx-nbits', \
'compressed-tensors'; got ['tflite'].
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
    road: Road,
    found: Found | None,
    quantized: QuantizedModel,
    formats: Sequence[Format],
    folder: Path,
    *,
    max_drop: float | None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> tuple[ExportRecord, ...]:
    """Write the exports; one that fails is a record that says why, never an error at fit end.

    Args:
        road: The road; its guest ends as it was.
        found: Batches that give the example and calibrate the ranges of activations.
        quantized: The quantized weights and what is known of them.
        formats: What to write.
        folder: Where the files go.
        max_drop: Most that int8 may lose of the monitored metric.
        ranges: Name of a weight -> the ends of its layer's inputs, where they were trained.
    """
    source = _Source(road, found, quantized, max_drop, ranges or {})
    records = []
    for number, chosen in enumerate(formats):
        if road.tell is not None:
            road.tell(f"exporting {chosen.name}", number, len(formats))
        records.append(_export(chosen, source, folder / chosen.file))
    return tuple(records)


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

    road: Road
    found: Found | None
    quantized: QuantizedModel
    max_drop: float | None
    ranges: Mapping[str, tuple[float, float]]

    def subject(self, chosen: Format) -> tuple[Subject, str]:
        """Return what a format is given, and why it has no judge where it could use one."""
        weights = self.quantized.weights
        if not chosen.traces:
            return Subject(weights), ""
        traced = Subject(weights, self.road.guest, self.example)
        if not chosen.calibrates:
            return traced, ""
        batches = [] if self.found is None else list(self.found.batches)
        seen = _seen_calls(self.road, batches)
        judge_forward, unjudged = _judge(self.road, self.quantized.report)
        _detach_(self.road)
        calls = [
            find_example(self.road.guest, batch, own=False, call=call)
            for batch, call in zip(batches, seen, strict=True)
        ]
        beside = _left_out(seen, calls)
        if judge_forward is not None and beside:
            judge_forward, unjudged = (
                None,
                (
                    f"validation_step gives forward {beside} too, which the exported file does not take: judged by its "
                    "outputs, not by a metric"
                ),
            )
        return (
            replace(
                traced,
                calibration=calls,
                judge=judge_forward,
                max_drop=self.max_drop,
                ranges=self.ranges,
            ),
            unjudged,
        )

    @cached_property
    def example(self) -> Example:
        return find_call(self.road, self.found)


def _left_out(seen: Sequence[Example | None], calls: Sequence[Example]) -> str:
    """Return the keywords, such as labels, that a step gives forward and the exported calls do not."""
    pairs = zip(seen, calls, strict=True)
    names = (
        name
        for was, call in pairs
        if was is not None
        for name in was.kwargs
        if name not in call.kwargs
    )
    return ", ".join(dict.fromkeys(names))


def find_call(road: Road, found: Found | None) -> Example:
    """Return a call that the guest's `forward` accepts.

    Raises:
        ExportError: If none can be found.
    """
    batches = [] if found is None else list(found.batches[:1])
    seen = _seen_calls(road, batches)
    _detach_(road)
    return find_example(road.guest, batches[0] if batches else None, call=seen[0] if seen else None)


def _detach_(road: Road) -> None:
    road.guest._trainer = None
    road.guest.eval()


def _seen_calls(road: Road, batches: Sequence[Any]) -> list[Example | None]:
    """Return what `validation_step` first calls forward with for each batch; None where it does not.

    What a step passes to forward is known for certain only by running it: a batch of two tensors may
    be inputs and targets, two inputs, or one input that is a pair.
    """
    found: list[Example | None] = [None] * len(batches)
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


def _judge(road: Road, report: QuantizationReport) -> tuple[Judge | None, str]:
    """Return a judge by the monitored metric; without one, why there is none that forward decides."""
    monitor = report.monitor
    if monitor is None or monitor not in report.float_metrics:
        return None, "no validation metric is monitored"
    called = _metrics_with(road, road.guest.forward)[1]
    if not called:
        return None, (
            "validation_step does not call self(...) or self.forward(...), in whose place the exported "
            "file would run"
        )

    def judge_forward(forward: Forward) -> Judgement:
        metrics, _ = _metrics_with(road, forward)
        worse = metrics[monitor] - report.float_metrics[monitor]
        return Judgement(-worse if report.mode == "max" else worse, metrics)

    return judge_forward, ""


def _metrics_with(road: Road, forward: Forward) -> tuple[dict[str, float], bool]:
    """Return the validation metrics with `forward` in the place of the module's, and if it was used."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return forward(*args, **kwargs)

    return judge(road, forward=counted), bool(calls)
