"""The report as a table on a terminal: rich where it is installed, plain text otherwise."""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest

from clipquant.report.digits import pair
from clipquant.report.exports import export_remarks, export_table
from clipquant.report.fitting import fit_table, wrap
from clipquant.report.naming import distinct
from clipquant.report.record import LayerRecord, QuantizationReport
from clipquant.report.summary import HEADER, SEARCH_HEADER, closing, figures_of, search_rows
from clipquant.shown import shown

LAYER_HEADER: tuple[str, ...] = (
    "weight",
    "shape",
    "bits",
    "method",
    "SQNR dB",
    "sensitivity",
    "bytes",
    "share",
)
SPARE = ("share", "shape", "method")  # left out first where a screen is narrow


def layer_rows(report: QuantizationReport) -> list[tuple[str, ...]]:
    """Return one row a quantized weight, under `LAYER_HEADER`."""
    return [
        (
            layer.name,
            "x".join(map(str, layer.shape)),
            f"{layer.bits:.3g}"
            + (" mixed" if len(layer.rows) > 1 else "")
            + coded_said(layer.coded_bits),
            layer.method,
            figure(layer.sqnr_db, ".1f"),
            figure(layer.sensitivity, ".2e"),
            f"{layer.bytes:,}",
            f"{layer.bytes / report.size_bytes:.1%}",
        )
        for layer in report.layers
    ]


def compare_rows(one: QuantizationReport, other: QuantizationReport) -> list[tuple[str, ...]]:
    """Return the rows (what, of the one, of the other) that lay two reports side by side, metrics first."""
    sides = (one, other)
    names = dict.fromkeys([*one.metric_names, *other.metric_names])
    rows: list[tuple[str, ...]] = [
        (
            f"{name} (monitored)" if name == one.monitor == other.monitor else name,
            *pair(*(side.quantized_metrics.get(name, math.nan) for side in sides)),
        )
        for name in names
    ]
    rows += [
        ("bytes", *(f"{side.size_bytes:,}" for side in sides)),
        ("times smaller than float", *(f"{side.ratio:.2f}" for side in sides)),
        ("bits per weight, with scales", *(f"{side.bits_per_weight:.2f}" for side in sides)),
    ]
    layers = [{layer.name: layer for layer in report.layers} for report in sides]
    weights = dict.fromkeys([*layers[0], *layers[1]])
    return rows + [(name, *(_brief(side.get(name)) for side in layers)) for name in weights]


def print_compared(one: QuantizationReport, other: QuantizationReport) -> None:
    """Print two files side by side, each under what tells its path from the other's."""
    names = distinct([str(side.path or "") for side in (one, other)], "/" + os.sep.strip("/"))
    print_table("Compared", ("", *names), compare_rows(one, other))


def print_report(report: QuantizationReport) -> None:
    """Print everything there is: verdict, figures, every weight, and what stays in float by its reason."""
    print_summary(report)
    header, *rows = [LAYER_HEADER, *layer_rows(report)]
    if all(layer.sensitivity is None for layer in report.layers):
        place = header.index("sensitivity")
        header, *rows = (row[:place] + row[place + 1 :] for row in (header, *rows))
    print_table("Weights", header, rows, SPARE)
    for why in dict.fromkeys(item.why for item in report.left):
        left = [(item.name, f"{item.bytes:,}") for item in report.left if item.why == why]
        print_table(f"Left in float: {why}", ("tensor", "bytes"), left)


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
        print_table("Exports", *export_table(report))
    for remark in export_remarks(report):
        if not remark.failed:
            print("Export " + "\n  ".join(map(shown, remark.lines)))
    for line in closing(report, said):
        copied = line.startswith(("Artifact", "Load it"))  # with the mouse: no line break of ours
        print(shown(line) if copied else wrap(shown(line), screen_width()))


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], spare: Sequence[str] = ()
) -> None:
    """Print rows under a header, as wide as the screen; the first column is text, the others are figures.

    Args:
        title: What stands over it.
        header: Names of columns.
        rows: Their cells.
        spare: Columns that are left out, in this order, where the screen is too narrow.
    """
    title, header = shown(title), tuple(map(shown, header))
    rows = [tuple(map(shown, row)) for row in rows]
    if find_spec("rich") is None:
        header, *rows = fit_table(header, rows, screen_width(), spare)
        print(plain_table(title, header, rows))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    header, *rows = fit_table(header, rows, screen_width(), spare, lambda columns: 3 * columns + 1)
    table = Table(title=Text(title), title_justify="left")
    for i, name in enumerate(header):
        table.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    widest = max(Console().width, Console(width=10**6).measure(table).maximum)
    Console(width=widest, soft_wrap=True).print(table)


def screen_width() -> int:
    """Return how many characters a line of the screen has; of a file or a pipe more than any table needs."""
    if sys.stdout.isatty() or "COLUMNS" in os.environ:
        return shutil.get_terminal_size().columns
    return 10**6


def plain_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return the table as lines of aligned text.

    >>> print(plain_table("Sizes", ("file", "bytes"), [("a", "1"), ("bb", "200")]))
    Sizes
    file  bytes
    a         1
    bb      200
    """
    cells = [[cell.split("\n") for cell in row] for row in (header, *rows)]
    widths = [max(len(line) for row in cells for line in row[i]) for i in range(len(header))]
    lines = [title]
    for row in cells:
        for first, *others in zip_longest(*row, fillvalue=""):
            figures = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
            lines.append("  ".join([first.ljust(widths[0]), *figures]).rstrip())
    return "\n".join(lines)


def figure(value: float | None, form: str) -> str:
    """Return a figure as text: a dash where it was not measured, "exact" where nothing was lost.

    >>> figure(None, ".1f"), figure(float("inf"), ".1f"), figure(21.28, ".1f")
    ('-', 'exact', '21.3')
    """
    if value is None or math.isnan(value):
        return "-"
    return "exact" if value == math.inf else format(value, form)


def coded_said(bits: float | None) -> str:
    """Return what a code takes on average in an entropy code, as the end of a text on its width.

    >>> coded_said(1.8036), coded_said(None)
    (', coded 1.8', '')
    """
    return "" if bits is None else f", coded {bits:.3g}"


def _brief(layer: LayerRecord | None) -> str:
    if layer is None:
        return "float or absent"
    sqnr = figure(layer.sqnr_db, ".1f")
    return f"{layer.bits:.3g} bits{coded_said(layer.coded_bits)}, {layer.method}, {sqnr} dB, {layer.bytes:,} bytes"
