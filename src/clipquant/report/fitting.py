"""Tables made to fit a screen: columns that matter least go, long names break where their parts meet."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

_LONG = 16  # characters that stand on one line anywhere
_JOINTS = re.compile(r"(?<=[._/\\])(?=[^._/\\])")

Rows = Sequence[Sequence[str]]


def fit_table(
    header: Sequence[str],
    rows: Rows,
    width: int,
    spare: Sequence[str] = (),
    frame: Callable[[int], int] = lambda columns: 2 * (columns - 1),
) -> list[list[str]]:
    r"""Return a header and rows whose lines fit a width, cells of several lines where they must be.

    Figures and short words never break. What cannot be made to fit stays wider than the screen.

    Args:
        header: Names of columns.
        rows: Their cells.
        width: Characters of a line.
        spare: Columns that are left out, in this order, before anything is broken.
        frame: Characters that so many columns take beside their cells.

    >>> fit_table(("weight", "bytes", "share"), [("net.encoder.weight", "1,024", "9%")], 20, ("share",))
    [['weight', 'bytes'], ['net.encoder.\nweight', '1,024']]
    """
    table = [list(header), *map(list, rows)]
    for name in spare:
        if _needed(table, frame) <= width:
            break
        place = table[0].index(name) if name in table[0] else -1
        table = [row[:place] + row[place + 1 :] for row in table] if place > 0 else table
    room = _rooms(table, width - frame(len(table[0])))
    return [[wrap(cell, most) for cell, most in zip(row, room, strict=True)] for row in table]


def _needed(table: Rows, frame: Callable[[int], int]) -> int:
    return sum(_widths(table)) + frame(len(table[0]))


def _widths(table: Rows) -> list[int]:
    return [max(map(len, column)) for column in zip(*table, strict=True)]


def _rooms(table: Rows, total: int) -> list[int]:
    """Return the width of each column: the widest gives way first, none below its longest piece."""
    rooms = _widths(table)
    least = [
        max(len(piece.rstrip()) for cell in column for piece in _pieces(cell))
        for column in zip(*table, strict=True)
    ]
    while sum(rooms) > total:
        able = [i for i, room in enumerate(rooms) if room > least[i]]
        if not able:
            break
        rooms[max(able, key=lambda i: rooms[i])] -= 1
    return rooms


def wrap(text: str, width: int) -> str:
    r"""Return text broken at spaces, and in long words after dots, underscores and slashes.

    >>> wrap("0.30 ms, 2 threads", 10), wrap("layers.0.output_dense.weight", 20)
    ('0.30 ms, 2\nthreads', 'layers.0.output_\ndense.weight')
    """
    lines = [""]
    for piece in _pieces(text):
        if lines[-1] and len((lines[-1] + piece).rstrip()) > width:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _pieces(text: str) -> list[str]:
    words = re.findall(r"\S+\s*|\s+", text) or [""]
    return [
        piece
        for word in words
        for piece in (_JOINTS.split(word) if len(word.rstrip()) > _LONG else [word])
    ]
