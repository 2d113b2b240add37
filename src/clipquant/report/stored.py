"""The part of a report that cannot be read off a file's weights: to what a file stores and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.report.layers import bits_per_weight, layer_record, typical_values
from clipquant.report.record import Budget, Histogram, LayerRecord, QuantizationReport, Trial
from clipquant.stored import (
    StoredBars,
    StoredBudget,
    StoredLayer,
    StoredReport,
    StoredTrial,
    write_stored,
)

_LONGEST = 1000  # characters of a text in the file


class Described(Protocol):
    """What a file says of itself, as far as a report needs it."""

    @property
    def report(self) -> StoredReport | None: ...

    @property
    def sha256(self) -> str: ...


def describe(report: QuantizationReport) -> dict[str, Any]:
    """Return the metadata entries from which `report_of` makes the report of a file.

    Whatever the file's weights tell is left out, and figures of single layers are kept to six
    digits, so that a layer costs about 100 bytes. Latency is left out too: the same weights and
    metrics give the same bytes.

    Args:
        report: What to keep.

    Returns:
        JSON-able: "report", and "details" (of single layers), which a small file does without.
    """
    return write_stored(
        StoredReport(
            before=_stored_metrics(report.float_metrics),
            after=_stored_metrics(report.quantized_metrics),
            monitor=report.monitor,
            mode=report.mode,
            drop_error=report.drop_error,
            seed=report.seed,
            calibration=_clipped(report.calibration),
            environment={name: _clipped(said) for name, said in report.environment.items()},
            layers={layer.name: _layer(layer) for layer in report.layers},
            budget=_budget(report.budget),
            failures=tuple(map(_clipped, report.failures)),
        )
    )


def report_of(
    weights: QuantizedWeights, metadata: Described, size_bytes: int, path: str | None = None
) -> QuantizationReport:
    """Return the report of a file from what it holds, with no model and no data.

    Args:
        weights: The weights read from the file; their codes are not looked at.
        metadata: What the file says of itself; where it says little of its report, figures that need
            the float weights are NaN.
        size_bytes: Its size.
        path: Its name.
    """
    about = metadata.report or StoredReport()
    return QuantizationReport(
        layers=tuple(_read_layer(n, t, about.layers.get(n)) for n, t in weights.tensors.items()),
        left=weights.left,
        float_bytes=_float_bytes(weights),
        size_bytes=size_bytes,
        bits_per_weight=bits_per_weight(weights.tensors.values()),
        float_metrics=_metrics(about.before),
        quantized_metrics=_metrics(about.after),
        monitor=about.monitor,
        mode=about.mode,
        drop_error=about.drop_error,
        path=path,
        budget=_read_budget(about.budget, size_bytes),
        environment=about.environment,
        seed=about.seed,
        sha256=metadata.sha256,
        calibration=about.calibration,
        failures=about.failures,
    )


def _layer(layer: LayerRecord) -> StoredLayer:
    bars = layer.histogram
    held = None
    if bars is not None and math.isfinite(bars.low) and math.isfinite(bars.high):
        held = StoredBars(_rounded(bars.low), _rounded(bars.high), bars.counts)
    return StoredLayer(_short(layer.sqnr_db), _short(layer.sensitivity), _clipped(layer.note), held)


def _read_layer(name: str, tensor: QuantizedTensor, held: StoredLayer | None) -> LayerRecord:
    if held is None:
        return layer_record(name, tensor, math.nan, None, None)
    shown = None
    if held.bars is not None:
        bars = held.bars
        shown = Histogram(bars.low, bars.high, bars.counts, *typical_values(tensor))
    sqnr = math.inf if held.sqnr_db is None else held.sqnr_db
    return replace(layer_record(name, tensor, sqnr, held.sensitivity, shown), note=held.note)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else _rounded(value)


def _clipped(said: str) -> str:
    return said if len(said) <= _LONGEST else said[: _LONGEST - 3] + "..."


def _stored_metrics(metrics: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def _metrics(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _float_bytes(weights: QuantizedWeights) -> int:
    quantized = sum(t.numel * t.dtype.itemsize for t in weights.tensors.values())
    return quantized + sum(tensor.nbytes for tensor in weights.floats.values())


def _budget(budget: Budget | None) -> StoredBudget | None:
    """Return a budget without the size of the file itself, which would have to hold its own."""
    if budget is None:
        return None
    trials = (
        StoredTrial(
            0 if t.chosen else t.size_bytes,
            None if t.value is None or not math.isfinite(t.value) else float(t.value),
            t.what,
            t.chosen,
            t.error,
        )
        for t in budget.trials
    )
    return StoredBudget(
        budget.max_drop,
        budget.max_size,
        _clipped(budget.failure),
        tuple(trials),
        budget.confidence,
        budget.sure,
        _clipped(budget.unsure),
    )


def _read_budget(held: StoredBudget | None, size_bytes: int) -> Budget | None:
    if held is None:
        return None
    trials = tuple(
        Trial(size_bytes if t.chosen else t.size_bytes, t.value, t.what, t.chosen, t.error)
        for t in held.trials
    )
    return Budget(
        held.max_drop, held.max_size, trials, held.failure, held.confidence, held.sure, held.unsure
    )
