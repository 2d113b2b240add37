"""What the exported files came to, as rows of a table and remarks beneath it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipquant.report.plots import counted
from clipquant.report.record import QuantizationReport

EXPORT_HEADER = ("export", "bytes", "metric", "latency, ms", "float ONNX, ms")


def export_table(report: QuantizationReport) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return header and rows of the exports, without columns in which nothing was measured."""
    rows = export_rows(report)
    kept = [i for i in range(len(EXPORT_HEADER)) if any(row[i] != "-" for row in rows)]
    header, *rows = (tuple(row[i] for i in kept) for row in (EXPORT_HEADER, *rows))
    return header, rows


def export_rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Return one row an export under `EXPORT_HEADER`: a dash where nothing was measured or written."""
    return [_row(export, report.monitor) for export in report.exports]


def _row(export: Mapping[str, Any], monitor: str | None) -> tuple[str, ...]:
    if export["error"]:
        return export["format"], "failed", "-", "-", "-"
    metrics: Mapping[str, float] = export["metrics"]
    name = monitor if monitor in metrics else next(iter(metrics), None)
    metric = "-" if name is None else f"{name} {metrics[name]:.6g}"
    own, other = latencies(export)
    return export["format"], f"{export['bytes']:,}", metric, own or "-", other or "-"


def latencies(export: Mapping[str, Any]) -> tuple[str, str]:
    """Return an export's milliseconds and those of the float model, each with its batch size.

    >>> latencies({"timings": [{"batch": 1, "float_ms": 0.72, "own_ms": 0.3, "threads": 2}]})
    ('0.300 (batch 1)', '0.720 (batch 1)')
    """

    def listed(key: str) -> str:
        return ", ".join(
            f"{timing[key]:.3f} (batch {timing['batch']})" for timing in export["timings"]
        )

    return listed("own_ms"), listed("float_ms")


@dataclass(frozen=True)
class Remark:
    """What the reader should know of an export.

    Args:
        lines: Its file's name and notes; of exports that failed, why.
        failed: Whether there is no file.
    """

    lines: tuple[str, ...]
    failed: bool = False


def export_remarks(report: QuantizationReport) -> list[Remark]:
    """Return a remark for each export; those that failed for one reason share one."""
    reasons: dict[str, list[str]] = {}
    for export in report.exports:
        if export["error"]:
            reasons.setdefault(export["error"], []).append(export["format"])
    written = [Remark(_written(export)) for export in report.exports if not export["error"]]
    failed = [(f"{', '.join(names)} failed: {why}",) for why, names in reasons.items()]
    return [*written, *(Remark(lines, failed=True) for lines in failed)]


def _written(export: Mapping[str, Any]) -> tuple[str, ...]:
    lines = [f"{export['format']}: {Path(export['path']).name}"]
    if export["difference"] is not None:
        lines.append(
            f"outputs within {export['difference']:.3g} of the quantized model's on the example input"
        )
    for timing in export["timings"][:1]:
        on = counted(timing["threads"], "thread")
        lines.append(f"latency: medians in onnxruntime with {on}, both files in turn")
    return (*lines, *export["notes"])
