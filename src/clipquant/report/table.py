"""The report as a table on a terminal: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec

from clipquant.report.exports import EXPORT_HEADER, export_remarks, export_rows
from clipquant.report.record import LayerRecord, QuantizationReport
from clipquant.report.summary import HEADER, SEARCH_HEADER, closing, figures_of, search_rows
from clipquant.shown import shown

LAYER_HEADER = ("weight", "shape", "bits", "method", "SQNR dB", "sensitivity", "bytes", "share")


def layer_rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Return one row a quantized weight, under `LAYER_HEADER`."""
    return [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            _bits(layer),
            layer.method,
            figure(layer.sqnr_db, ".1f"),
            figure(layer.sensitivity, ".2e"),
            f"{layer.bytes:,}",
            f"{layer.bytes / report.size_bytes:.1%}",
        )
        for layer in report.layers
    ]


def compare_rows(one: QuantizationReport, other: QuantizationReport) -> list[tuple[str, ...]]:
    """Return the rows (what, of the one, of the other) that lay two reports side by side."""
    rows: list[tuple[str, ...]] = [
        ("bytes", f"{one.size_bytes:,}", f"{other.size_bytes:,}"),
        ("times smaller than float", f"{one.ratio:.2f}", f"{other.ratio:.2f}"),
        ("bits per weight", f"{one.bits_per_weight:.2f}", f"{other.bits_per_weight:.2f}"),
    ]
    rows += [
        (name, *(figure(side.quantized_metrics.get(name), ".6g") for side in (one, other)))
        for name in dict.fromkeys([*one.quantized_metrics, *other.quantized_metrics])
    ]
    layers = [{layer.name: layer for layer in report.layers} for report in (one, other)]
    names = dict.fromkeys([*layers[0], *layers[1]])
    return rows + [(name, *(_brief(side.get(name)) for side in layers)) for name in names]


def print_report(report: QuantizationReport) -> None:
    """Print everything there is: verdict, figures, every weight, and what stays in float."""
    print_summary(report)
    print_table("Weights", LAYER_HEADER, layer_rows(report))
    if report.left:
        rows = [(item.name, f"{item.bytes:,}", item.why) for item in report.left]
        print_table("Left in float", ("tensor", "bytes", "why"), rows)


def print_summary(report: QuantizationReport, said: Sequence[str] = ()) -> None:
    """Print the table at the end of a fit: before and after, the file and how to load it, and what to worry about.

    Args:
        report: What to print.
        said: Worries that the reader has been told already, or is about to be.
    """
    print_table("Quantized", HEADER, figures_of(report))
    if report.budget is not None and len(report.budget.trials) > 1:
        print_table("Search", SEARCH_HEADER, search_rows(report))
    told = [export for export in report.exports if not export["error"]]
    if told:
        print_table("Exports", EXPORT_HEADER, export_rows(report))
    for remark in export_remarks(report):
        if not remark.failed:
            print("Export " + "\n  ".join(map(shown, remark.lines)))
    for line in closing(report, said):
        print(shown(line))


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header; the first column is text, the others are figures."""
    title, header = shown(title), tuple(map(shown, header))
    rows = [tuple(map(shown, row)) for row in rows]
    if find_spec("rich") is None:
        print(plain_table(title, header, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as lines of aligned text.

    >>> print(plain_table("Sizes", ("file", "bytes"), [("a", "1"), ("bb", "200")]))
    Sizes
    file  bytes
    a         1
    bb      200
    """
    cells = [list(header), *map(list, rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = [title]
    for row in cells:
        figures = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append("  ".join([row[0].ljust(widths[0]), *figures]).rstrip())
    return "\n".join(lines)


def figure(value: float | None, form: str) -> str:
    """Return a figure as text: a dash where it was not measured, "exact" where nothing was lost.

    >>> figure(None, ".1f"), figure(float("inf"), ".1f"), figure(21.28, ".1f")
    ('-', 'exact', '21.3')
    """
    if value is None or math.isnan(value):
        return "-"
    return "exact" if value == math.inf else format(value, form)


def _bits(layer: LayerRecord) -> str:
    """Return the width of a layer's codes, and what they take on average in an entropy code."""
    mixed = " mixed" if len(layer.rows) > 1 else ""
    coded = "" if layer.coded_bits is None else f", coded {layer.coded_bits:.3g}"
    return f"{layer.bits:.3g}{mixed}{coded}"


def _brief(layer: LayerRecord | None) -> str:
    if layer is None:
        return "float or absent"
    sqnr = figure(layer.sqnr_db, ".1f")
    return f"{_bits(layer)} bits, {layer.method}, {sqnr} dB, {layer.bytes:,} bytes"
