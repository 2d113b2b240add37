"""Tables of the page: rows and columns where there is room, a block a row on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from clipquant.quant.codes.weights import LeftInFloat
from clipquant.report.digits import measured
from clipquant.report.exports import export_table
from clipquant.report.plots import counted
from clipquant.report.record import LayerRecord, QuantizationReport, Trial, drop_of
from clipquant.report.summary import way
from clipquant.report.table import coded_said, figure
from clipquant.report.text import breakable, escape

_FEW = 8  # names that are shown without being asked for


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Args:
        body: What it shows, as HTML.
        key: What a click on the column's heading sorts by.
    """

    body: str
    key: str | float = ""


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Args:
        name: Its heading; on a phone it stands before each of its figures.
        number: Whether it is sorted as numbers.
    """

    name: str
    number: bool = True


def sheet(
    columns: Sequence[Column], rows: Sequence[Sequence[Cell]], chosen: int = -1, sorts: bool = False
) -> str:
    """Return a table as HTML; its first column says what a row is about.

    Args:
        columns: Its columns.
        rows: A cell a column each.
        chosen: The row that is marked.
        sorts: Whether a click on a heading sorts it.
    """
    kind = " sortable" if sorts else ""
    heads = "".join(_head(column, sorts) for column in columns)
    marks = ['<tr class="chosen">' if i == chosen else "<tr>" for i in range(len(rows))]
    body = "".join(
        mark + "".join(map(_cell, columns, row)) + "</tr>"
        for mark, row in zip(marks, rows, strict=True)
    )
    return (
        f'<div class="scroll"><table class="sheet{kind}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _head(column: Column, sorts: bool) -> str:
    name = escape(column.name)
    if not sorts:
        return f'<th scope="col">{name}</th>'
    kind = "number" if column.number else "text"
    return (
        f'<th scope="col" data-kind="{kind}"><button type="button"'
        f' title="sort by {name}">{name}</button></th>'
    )


def _cell(column: Column, cell: Cell) -> str:
    key = f' data-key="{escape(cell.key)}"' if cell.key != "" else ""
    return f'<td data-label="{escape(column.name)}"{key}>{cell.body}</td>'


def weights_sheet(report: QuantizationReport) -> str:
    """Return a row a quantized weight; the column of sensitivities only where they were estimated."""
    estimated = any(layer.sensitivity is not None for layer in report.layers)
    columns = [Column("weight", number=False), Column("shape"), Column("bits")]
    columns += [Column("method", number=False), Column("SQNR dB")]
    columns += [Column("sensitivity")] if estimated else []
    columns += [Column("bytes"), Column("share of file")]
    rows = [_weight(layer, report.size_bytes, estimated) for layer in report.layers]
    return sheet(columns, rows, sorts=True)


def _weight(layer: LayerRecord, size: int, estimated: bool) -> list[Cell]:
    share = layer.bytes / size
    note = f'<br><span class="note">{breakable(layer.note)}</span>' if layer.note else ""
    cells = [
        Cell(breakable(layer.name) + note, layer.name),
        Cell(" x ".join(map(str, layer.shape)), math.prod(layer.shape)),
        Cell(_bits(layer), layer.bits),
        Cell(escape(layer.method), layer.method),
        Cell(figure(layer.sqnr_db, ".1f"), _key(layer.sqnr_db)),
    ]
    if estimated:
        cells.append(Cell(figure(layer.sensitivity, ".2e"), _key(layer.sensitivity)))
    return [*cells, Cell(f"{layer.bytes:,}", layer.bytes), Cell(f"{share:.1%}", share)]


def _bits(layer: LayerRecord) -> str:
    return escape(f"{layer.bits:.2f}".removesuffix(".00") + coded_said(layer.coded_bits))


def _key(value: float | None) -> float | str:
    """Return what the browser sorts by: JavaScript's spelling of infinity, missing as lowest."""
    if value is None or math.isnan(value):
        return "-Infinity"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def trials_sheet(report: QuantizationReport, trials: Sequence[Trial]) -> str:
    """Return a row a trial of the search, the largest first."""
    ordered = sorted(trials, key=lambda trial: -trial.size_bytes)
    columns = list(map(Column, ("bytes", report.monitor or "", "drop", "tried")))
    chosen = next((i for i, trial in enumerate(ordered) if trial.chosen), -1)
    return sheet(columns, [_trial(trial, report) for trial in ordered], chosen)


def _trial(trial: Trial, report: QuantizationReport) -> list[Cell]:
    value = math.nan if trial.value is None else trial.value
    drop = drop_of(report.float_metrics[report.monitor or ""], value, report.mode)
    cells = (f"{trial.size_bytes:,}", f"{value:.6g}", measured(drop, trial.error), way(trial))
    return [Cell(escape(cell)) for cell in cells]


def exports_sheet(report: QuantizationReport) -> str:
    """Return a row an export."""
    header, rows = export_table(report)
    return sheet(list(map(Column, header)), [[Cell(breakable(c)) for c in row] for row in rows])


def left_sheets(left: Sequence[LeftInFloat]) -> str:
    """Return what stays in float, a part a reason: how many tensors and bytes, and which."""
    reasons: dict[str, list[LeftInFloat]] = {}
    for item in left:
        reasons.setdefault(item.why, []).append(item)
    is_open = " open" if len(left) <= _FEW else ""
    return "".join(_left(why, items, is_open) for why, items in reasons.items())


def _left(why: str, items: Sequence[LeftInFloat], is_open: str) -> str:
    total = f"{counted(len(items), 'tensor')}, {sum(item.bytes for item in items):,} bytes"
    rows = [[Cell(breakable(item.name)), Cell(f"{item.bytes:,}")] for item in items]
    return (
        f'<details{is_open}><summary><span class="reason">{breakable(why)}</span> '
        f'<span class="note">{total}</span></summary>'
        f"{sheet([Column('tensor'), Column('bytes')], rows)}</details>"
    )
