"""The report as a table on a terminal: rich where it is installed, plain text otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from clipquant.report.record import QuantizationReport


def summary_rows(report: QuantizationReport) -> list[tuple[str, str, str]]:
    """Return the rows (what, float, quantized) of the table at the end of a fit."""
    rows = [
        (
            name + (" (monitored)" if name == report.monitor else ""),
            f"{value:.6g}",
            f"{report.quantized_metrics[name]:.6g}",
        )
        for name, value in report.float_metrics.items()
    ]
    bits = f"{report.bits_per_weight:.2f}"
    return [
        *rows,
        ("bytes", f"{report.float_bytes:,}", f"{report.size_bytes:,}"),
        ("ratio", "1", f"{report.ratio:.2f} times smaller"),
        ("bits per weight, scales included", "32", bits),
    ]


def print_summary(report: QuantizationReport) -> None:
    """Print the table at the end of a fit, and where the file stands."""
    print_table("Quantized", ("", "float", "quantized"), summary_rows(report))
    if report.path:
        print(f"Artifact: {report.path}")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print rows under a header; the first column is text, the others are figures."""
    if find_spec("rich") is None:
        print(plain_table(title, header, rows))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
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
