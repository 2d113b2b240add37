"""Probabilities of codes that follow what has been coded: whole numbers alone, so that every machine has the same."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from clipquant.quant.codes.lines import Codes, Ints, Lines

CLASSES = 10  # of codes, by how far from zero those in their row and beside them lie
_GAIN = 32  # what a code seen adds to its count
_MOST = 1 << 22  # at which counts are halved, so that the last 130,000 codes count most
_BELIEF = 24  # codes of a class that weigh as much as what is known of all classes
_FRESH = 64  # frequencies follow the counts when a 64th of all codes has come since
_FIRST = 8  # codes coded together at the very beginning
_EIGHTHS = (256, 279, 304, 332, 362, 395, 431, 470)  # 2**(i / 8), times 256
_STEPS = np.array([part << octave >> 4 for octave in range(12) for part in _EIGHTHS], np.int64)
_ONE = int(np.searchsorted(_STEPS, 256, "right"))  # the step of a ratio of 1
_LOWEST = 20  # a ratio below 2**(-16 / 8) is in the first class, one above 2**(16 / 8) in the last


class Frequencies:
    """How often each code has been seen in each class, and the frequencies foretold from that.

    A class of which little is known is believed to be like all codes together.

    Args:
        classes: How many.
        alphabet: How many codes there are, 2 to 256.

    Source:
        Krichevsky and Trofimov 1981 (half a count for what was never seen); MacKay and Peto 1995, "A
        hierarchical Dirichlet language model" (the belief of a class).

    >>> frequencies = Frequencies(1, 3)
    >>> frequencies.add_(np.array([2, 2, 1], np.int32))
    >>> frequencies.follow_()
    True
    >>> frequencies.of(0).tolist()
    [16, 48, 80]
    """

    def __init__(self, classes: int, alphabet: int) -> None:
        self._own = np.zeros((classes, alphabet), np.int64)
        self._all = np.full(alphabet, _GAIN // 2, np.int64)
        self._seen = self._since = 0
        self._table = self._foretold()

    @property
    def together(self) -> int:
        """How many codes may be coded by the same frequencies: few as long as little is known."""
        return max(_FIRST, self._seen // 4)

    def of(self, index: int) -> Ints:
        """Return the frequencies of the codes in a class, each 1 or more, below 2**23 together."""
        found: Ints = self._table[index]
        return found

    def add_(self, codes: NDArray[np.int32], classes: Codes | None = None) -> None:
        """Count codes of some classes; without any, of the first."""
        size = self._own.size
        if classes is None:
            found = np.bincount(codes, minlength=size)
        else:
            found = np.bincount(codes + classes * np.intp(len(self._all)), minlength=size)
        found = _GAIN * found.reshape(self._own.shape)
        self._own += found
        self._all += found.sum(0)
        self._seen += len(codes)
        self._since += len(codes)

    def follow_(self) -> bool:
        """Let the frequencies follow the counts, where enough codes have come; return whether they did."""
        if self._since * _FRESH < self._seen:
            return False
        self._since = 0
        while int(self._all.sum()) > _MOST:
            self._all = np.maximum(self._all >> 1, 1)
        while (large := self._own.sum(1) > _MOST).any():
            self._own[large] >>= 1
        self._table = self._foretold()
        return True

    def _foretold(self) -> Ints:
        if len(self._own) == 1:
            return self._all[None].copy()
        return self._own + self._all * (_BELIEF * _GAIN) // int(self._all.sum()) + 1


class Surroundings:
    """The class of each code of a line: by the mean distance from zero in its row and in the columns before it.

    Args:
        lines: How the matrix falls into lines.
        middle: Twice the code of zero, of each row (rows, 1) or each column (1, columns).
    """

    def __init__(self, lines: Lines, middle: Ints) -> None:
        self._lines, self._middle = lines, middle
        self._rows = np.zeros(lines.rows, np.int64)
        self._near = np.full(lines.across, 256, np.int64)
        self._columns = 0

    def classes(self, line: int) -> Codes:
        """Return the class of each code of the next line, (rows, width)."""
        width, total = self._lines.width(line), int(self._rows.sum())
        far = self._rows * (len(self._rows) * 256) // max(total, 1) if total else self._rows + 256
        rows, near = (
            (np.searchsorted(_STEPS, part, "right") - _ONE).astype(np.int16)
            for part in (far, self._near[:width])
        )
        sums = rows[:, None] + near + np.int16(_LOWEST)
        return np.clip(sums >> 2, 0, CLASSES - 1, out=sums).astype(np.uint8)

    def add_(self, line: int, codes: Codes) -> None:
        """Take in the codes of a line, (rows, width)."""
        width, middle = codes.shape[1], self._lines.of(self._middle, line)
        distance = np.abs(2 * codes.astype(np.int32) - middle.astype(np.int32))
        self._rows += distance.sum(1)
        self._columns += width
        total = max(int(self._rows.sum()), 1)
        ratio = distance.sum(0, dtype=np.int64) * (256 * self._columns) // total
        self._near[:width] = self._near[:width] + ratio >> 1
