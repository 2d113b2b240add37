"""What the reader of a report should worry about: what was missed, what failed, and what is too good to be true."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clipquant.report.record import QuantizationReport

GAIN = 0.1  # of a metric; rounding weights rarely improves one by more


def worries(report: QuantizationReport) -> tuple[str, ...]:
    """Return, in words, what is to be looked at before a file is used; the most serious first."""
    found = [
        report.suspicion,
        ""
        if report.budget is None or report.budget.met
        else f"Budget missed: {report.budget.failure}.",
        boundless(report),
        unsure(report),
        larger(report),
        report.warning,
        *_exports(report),
        *report.failures,
    ]
    return tuple(dict.fromkeys(filter(None, found)))


def suspicion(report: QuantizationReport) -> str:
    """Return why a monitored metric that got better is not believed; empty where it is.

    Args:
        report: One whose metric got better by more than a tenth of its size is held for one that is read the wrong
            way round, or measured differently each time.
    """
    drop, before = report.drop, report.float_metrics.get(report.monitor or "")
    if drop is None or before is None or not math.isfinite(drop) or drop >= 0:
        return ""
    after = report.quantized_metrics[report.monitor or ""]
    if -drop <= GAIN * max(abs(before), abs(after)):
        return ""
    way = "higher" if report.mode == "max" else "lower"
    return (
        f"{report.monitor} went from {before:.4g} to {after:.4g}, which mode={report.mode!r} ({way} is better) "
        "takes for a gain. That is more than rounding weights can explain: check mode, and that validation gives the "
        "same each time"
    )


def unsure(report: QuantizationReport) -> str:
    """Return that a drop is kept as measured alone, without its chance being known; empty where that is known."""
    budget = report.budget
    if budget is None or not budget.met or not budget.unsure:
        return ""
    asked = "" if budget.confidence is None else f", not confidence={budget.confidence:g}"
    return f"max_drop is kept by the drop measured{asked}: {budget.unsure}"


def boundless(report: QuantizationReport) -> str:
    """Return that a max_drop lets a metric fall to nothing; empty where it does not."""
    most = None if report.budget is None else report.budget.max_drop
    before = report.float_metrics.get(report.monitor or "")
    if most is None or before is None or report.mode != "max" or not 0 < before <= most:
        return ""
    return (
        f"max_drop={most:g} lets {report.monitor} fall from {before:.4g} to nothing. It is in the metric's own units: "
        "half a point of a hundred is 0.005 of an accuracy between 0 and 1"
    )


def larger(report: QuantizationReport) -> str:
    """Return that a file is larger than its float tensors; empty where it is not."""
    if report.size_bytes <= report.float_bytes:
        return ""
    return (
        f"The file has {report.size_bytes:,} bytes, more than the {report.float_bytes:,} of the float tensors: names, "
        "shapes and scales outweigh what is saved on so small a model. Keep the float weights, or quantize a larger one"
    )


def _exports(report: QuantizationReport) -> Iterator[str]:
    """Yield why exports failed; those that did for one reason share a line."""
    reasons: dict[str, list[str]] = {}
    for export in report.exports:
        if export.get("error"):
            reasons.setdefault(export["error"], []).append(export["format"])
    for why, names in reasons.items():
        yield f"Export {', '.join(names)} failed: {why}"
