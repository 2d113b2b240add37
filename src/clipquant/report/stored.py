"""The part of a report that cannot be read off a file's weights: to its metadata and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.report.layers import bits_per_weight, layer_record, typical_values
from clipquant.report.record import (
    Budget,
    Histogram,
    LayerRecord,
    QuantizationReport,
    Trial,
    jsonable,
)

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/"
_PLAIN = ("monitor", "mode", "seed", "calibration", "environment", "failures")


def describe(report: QuantizationReport) -> dict[str, Any]:
    """Return the metadata entry from which `report_of` makes the report of a file.

    Whatever the file's weights tell is left out, and figures of single layers are kept to six
    digits, so that a layer costs about 100 bytes. Latency is left out too: the same weights and
    metrics give the same bytes.

    Args:
        report: What to keep.

    Returns:
        One JSON-able entry, "report".
    """
    about: dict[str, Any] = {name: getattr(report, name) for name in _PLAIN}
    about["metrics"] = [dict(report.float_metrics), dict(report.quantized_metrics)]
    about["layers"] = {layer.name: _layer(layer) for layer in report.layers}
    about["budget"] = _budget(report.budget)
    return {"report": jsonable({k: v for k, v in about.items() if v not in (None, "", {}, ())})}


def report_of(
    weights: QuantizedWeights, metadata: Mapping[str, Any], size_bytes: int, path: str | None = None
) -> QuantizationReport:
    """Return the report of a file from what it holds, with no model and no data.

    Args:
        weights: The weights read from the file.
        metadata: Its JSON object; the report's entry may be missing, then figures that need the
            float weights are NaN.
        size_bytes: Its size.
        path: Its name.
    """
    about = metadata.get("report", {})
    layers = about.get("layers", {})
    before, after = about.get("metrics", ({}, {}))
    return QuantizationReport(
        layers=tuple(_read_layer(n, t, layers.get(n)) for n, t in weights.tensors.items()),
        left=weights.left,
        float_bytes=_float_bytes(weights),
        size_bytes=size_bytes,
        bits_per_weight=bits_per_weight(weights.tensors.values()),
        float_metrics=_numbers(before),
        quantized_metrics=_numbers(after),
        path=path,
        budget=_read_budget(about.get("budget"), size_bytes),
        sha256=metadata.get("sha256"),
        **_plain(about),
    )


def _plain(about: Mapping[str, Any]) -> dict[str, Any]:
    known = {name: about[name] for name in _PLAIN if name in about}
    return known | ({"failures": tuple(known["failures"])} if "failures" in known else {})


def _layer(layer: LayerRecord) -> list[Any]:
    entry = [_short(layer.sqnr_db), _short(layer.sensitivity), layer.note]
    if layer.histogram is None:
        return entry
    bars = "".join(_DIGITS[count] for count in layer.histogram.counts)
    return [*entry, _short(layer.histogram.low), _short(layer.histogram.high), bars]


def _read_layer(name: str, tensor: QuantizedTensor, entry: list[Any] | None) -> LayerRecord:
    sqnr, sensitivity, note, *bars = entry or [None, None, ""]
    exact = math.inf if entry else math.nan
    shown = None
    if bars:
        low, high, digits = bars
        counts = tuple(_DIGITS.index(digit) for digit in digits)
        shown = Histogram(low, high, counts, *typical_values(tensor))
    record = layer_record(name, tensor, exact if sqnr is None else sqnr, sensitivity, shown)
    return replace(record, note=note)


def _short(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.6g}")


def _numbers(metrics: Mapping[str, float | None]) -> dict[str, float]:
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def _float_bytes(weights: QuantizedWeights) -> int:
    quantized = sum(t.numel * t.dtype.itemsize for t in weights.tensors.values())
    return quantized + sum(tensor.nbytes for tensor in weights.floats.values())


def _budget(budget: Budget | None) -> dict[str, Any] | None:
    """Return a budget without the size of the file itself, which would have to hold its own."""
    if budget is None:
        return None
    trials = [
        [0 if t.chosen else t.size_bytes, t.value, t.what, int(t.chosen)] for t in budget.trials
    ]
    return {**asdict(budget), "trials": trials}


def _read_budget(about: Mapping[str, Any] | None, size_bytes: int) -> Budget | None:
    if about is None:
        return None
    trials = tuple(
        Trial(size_bytes if chosen else size, value, what, bool(chosen))
        for size, value, what, chosen in about["trials"]
    )
    return Budget(**{**about, "trials": trials})
