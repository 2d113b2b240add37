"""A matrix of codes as lines that are coded one after another, each of columns that lie far apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Codes = NDArray[np.uint8]

_SHORT, _LONG = 1024, 2048  # codes in a line, so that what is done once a line costs little a code
_MANY = 64  # lines of a small matrix, so that the later ones learn from the earlier


@dataclass(frozen=True)
class Lines:
    """How a (rows, columns) matrix falls into lines: line t holds the columns t, t + count, t + 2 count and so on.

    Neighbouring columns stand in neighbouring lines, so that a line can be foretold from the ones before it.

    Args:
        rows: Of the matrix.
        columns: Of the matrix.

    >>> Lines(3, 4)
    Lines(rows=3, columns=4)
    >>> lines = Lines(2, 600)
    >>> lines.count, lines.across
    (2, 300)
    """

    rows: int
    columns: int

    @property
    def count(self) -> int:
        """Lines in all."""
        wanted = min(max(self.rows * self.columns // _MANY, _SHORT), _LONG)
        across = min(self.columns, -(-wanted // self.rows))
        return -(-self.columns // across)

    @property
    def across(self) -> int:
        """Columns in a line; the last lines may have one less."""
        return -(-self.columns // self.count)

    def width(self, line: int) -> int:
        """Return the columns of one line."""
        return -(-(self.columns - line) // self.count)

    def of(self, each: Ints, line: int) -> Ints:
        """Return the part of one line of what each row (rows, 1) or each column (1, columns) has."""
        return each if each.shape[0] > 1 or each.shape[1] == 1 else each[:, line :: self.count]

    def split(self, matrix: Codes) -> Codes:
        """Return a matrix as (lines, rows, across), what the last lines lack filled with zeros.

        >>> Lines(1024, 3).split(np.tile(np.array([1, 2, 3], np.uint8), (1024, 1))).shape
        (3, 1024, 1)
        """
        count, across = self.count, self.across
        whole = np.zeros((self.rows, across * count), np.uint8)
        whole[:, : self.columns] = matrix
        return np.ascontiguousarray(whole.reshape(self.rows, across, count).transpose(2, 0, 1))

    def join(self, lines: Codes) -> Codes:
        """Return the matrix that `split` made into lines: its inverse."""
        whole = lines.transpose(1, 2, 0).reshape(self.rows, -1)
        return whole[:, : self.columns]
