"""A report in few words: the rows and lines at the end of a fit, and what `print` and a notebook show of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from clipquant.quant.codes.trained import METHOD
from clipquant.report.digits import change_said, measured, pair, size
from clipquant.report.plots import counted
from clipquant.report.record import QuantizationReport, Trial, drop_of, ratio_said
from clipquant.report.text import escape

HEADER = ("", "float", "quantized", "change")
_WAYS = {"rows": "bits for each row", "trained": "as trained"}
SEARCH_HEADER = ("tried", "bytes", "metric", "drop", "")


def figures_of(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Return the rows (what, float, quantized, change): the metric that judges first, then sizes."""
    rows = [_metric_row(report, name) for name in report.metric_names]
    if not rows:
        rows = [("metric", "-", "-", "not judged")]
    sizes = (f"{report.float_bytes:,}", f"{report.size_bytes:,}")
    bits = f"{report.bits_per_weight:.3g}"
    return [
        *rows,
        ("bytes", *sizes, ratio_said(report.ratio)),
        ("bits per weight, with scales", "32", bits, ""),
    ]


def _metric_row(report: QuantizationReport, name: str) -> tuple[str, ...]:
    before, after = (
        metrics.get(name, math.nan) for metrics in (report.float_metrics, report.quantized_metrics)
    )
    label = f"{name} (monitored)" if name == report.monitor else name
    return label, *pair(before, after), _change(report, name, before, after)


def _change(report: QuantizationReport, name: str, before: float, after: float) -> str:
    """Return by how much a metric changed: worse or better only where it is known which way is which."""
    change = after - before
    if not math.isfinite(change):
        return "-"
    if change == 0 and (name != report.monitor or not report.drop_error):
        return "unchanged"
    if name != report.monitor or report.mode is None:
        return f"{change:+.2g}"
    return change_said(drop_of(before, after, report.mode), report.drop_error, digits=2)


def search_rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Return one row a file that a search for a budget has judged, in their order."""
    before = report.float_metrics.get(report.monitor or "")
    rows: list[tuple[str, ...]] = []
    for trial in () if report.budget is None else report.budget.trials:
        value, drop = "-", "-"
        if trial.value is not None:
            value = f"{trial.value:.4g}"
            lost = None if before is None else drop_of(before, trial.value, report.mode)
            drop = "-" if lost is None else measured(lost, trial.error, 2)
        rows.append(
            (way(trial), f"{trial.size_bytes:,}", value, drop, "chosen" if trial.chosen else "")
        )
    return rows


def way(trial: Trial) -> str:
    """Return how the bits of a trial were given, in words."""
    return _WAYS.get(trial.what, "one width for all")


def closing(report: QuantizationReport, said: Sequence[str] = ()) -> Iterator[str]:
    """Yield the lines beneath the table: the verdict, the file, how to load it, what to worry about.

    Args:
        report: What is told.
        said: Worries that are told elsewhere.
    """
    if report.monitor is not None and report.mode_from not in ("", "as given"):
        way = "higher" if report.mode == "max" else "lower"
        yield f"{report.monitor} judges: {way} is better, {report.mode_from}."
    if not report.float_metrics:
        yield "Not judged: there was nothing to judge by, so what the rounding costs is not known."
    if any(layer.method == METHOD for layer in report.layers):
        yield "Trained with these codes: what stands under float is the trained network, which computed with them."
    told = bool(report.budget and report.budget.failure and report.budget.failure in " ".join(said))
    if report.budget is not None and not told and not report.suspicion:
        yield report.verdict
    if report.path:
        path = _near(report.path)
        beside = Path(report.path).with_name("report.html").is_file()
        yield f"Artifact: {path}" + (" (and report.html)" if beside else "")
        yield f"Load it: clipquant.load_quantized({path!r}, model).eval()"
    for worry in report.worries:
        if not any(worry in other or other in worry for other in said):
            yield f"Look at: {worry}"


def _near(path: str) -> str:
    """Return a path as seen from the current folder, where it lies below it."""
    with suppress(ValueError, OSError):
        return str(Path(path).absolute().relative_to(Path.cwd()))
    return str(path)


def lines(report: QuantizationReport) -> Iterator[str]:
    """Yield what `repr` gives: a few lines.

    Args:
        report: What is told.
    """
    weights = len(report.layers)
    yield (
        f"QuantizationReport: {counted(weights, 'weight')} at {report.bits_per_weight:.3g} bits, "
        f"{size(report.float_bytes)} -> {size(report.size_bytes)}, {ratio_said(report.ratio)}"
    )
    for name, before, after, change in figures_of(report)[:3]:
        if name in ("metric", "bytes"):
            break
        yield f"  {name}: {before} -> {after}, {change}"
    yield from (f"  {line}" for line in closing(report) if not line.startswith("Load it"))


def html_table(report: QuantizationReport) -> str:
    """Return the table for a notebook, and what to worry about."""
    head = "".join(f"<th>{escape(name)}</th>" for name in HEADER)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in figures_of(report)
    )
    beneath = "".join(f"<div>{escape(line)}</div>" for line in closing(report))
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{beneath}"
