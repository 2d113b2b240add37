"""Codes to a stream of few bytes and back: the less surprising a code is, the fewer bits it takes."""

from __future__ import annotations

import importlib
import zlib
from collections.abc import Iterator
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from clipquant.errors import MissingPackageError, how_to_install
from clipquant.quant.codes.adaptive import CLASSES, Frequencies, Surroundings
from clipquant.quant.codes.grid import Grid, symmetric_zero
from clipquant.quant.codes.lines import Codes, Ints, Lines

LIBRARY, EXTRA = (
    "constriction",
    "entropy",
)  # what has the range coder, and what of this package brings it
HEAD = 5  # bytes before the coder's words: a checksum of the codes, and how they are foretold
_ROWS = 1 << 16  # of a matrix that are coded together: what is kept of each takes little memory
# All codes alike, as they are or from each row's zero on; by classes, from each row's zero on, along rows or columns.
_PLAIN, _ALONG, _ACROSS, _ALONE = range(4)
_WAYS = (_PLAIN, _ALONG, _ACROSS, _ALONE)
_Run: TypeAlias = NDArray[np.int32]


class StreamError(ValueError):
    """Bytes that no codes gave."""


class _End(Protocol):
    """One of a stream's two ends: takes a run of codes of given probabilities in, or gives it out."""

    def code(self, run: _Run, model: Any) -> _Run: ...


class _Encoder:
    def __init__(self) -> None:
        self._coder = coder_library().stream.queue.RangeEncoder()

    def code(self, run: _Run, model: Any) -> _Run:
        self._coder.encode(run, model)
        return run

    def words(self) -> bytes:
        return bytes(self._coder.get_compressed().astype("<u4").tobytes())


class _Decoder:
    def __init__(self, words: bytes) -> None:
        held = np.frombuffer(words, "<u4").astype(np.uint32)
        self._coder = coder_library().stream.queue.RangeDecoder(held)

    def code(self, run: _Run, model: Any) -> _Run:
        found: _Run = self._coder.decode(model, len(run))
        return found

    def left(self) -> bool:
        return not self._coder.maybe_exhausted()


def coder_library() -> Any:
    """Return the library that has the range coder.

    Raises:
        MissingPackageError: If it is not installed.
    """
    try:
        return importlib.import_module(LIBRARY)
    except ImportError as error:
        raise MissingPackageError(
            f"an entropy code needs the package {LIBRARY}, which is not installed: "
            + how_to_install(EXTRA)
        ) from error


def encode(codes: Tensor, grid: Grid, bits: int | Tensor) -> Tensor:
    """Return a weight's codes as a stream, the shortest of those that foretell them in different ways.

    A stream is a CRC-32 of the codes (4 bytes, little endian), the way in which they are foretold (a byte: 0, all
    alike; 1, by classes, line by line along the rows; 2, so along the columns; 3, all alike; 1 to 3 from each row's
    code of zero on, round the alphabet's end), and the 32-bit words of a range coder, little endian. Rows of one
    width follow those of a smaller one, each with an alphabet and frequencies of their own; see `Lines`,
    `Surroundings` and `Frequencies`. The codes of rows of 0 bits are all zero and cost nothing.

    Args:
        codes: uint8 (rows, columns).
        grid: Their grid.
        bits: Width of a code, or uint8 (rows,) where each row has its own.

    Returns:
        uint8 (bytes,).

    Raises:
        MissingPackageError: If the range coder's library is not installed.

    Source:
        Martin 1979, "Range encoding"; Bamler 2022, arXiv 2201.01741 (the library).
    """
    matrix = codes.cpu().numpy()
    found = min((_encoded(matrix, grid, bits, way) for way in _WAYS), key=len)
    check = zlib.crc32(np.ascontiguousarray(matrix).tobytes()).to_bytes(4, "little")
    return torch.frombuffer(bytearray(check + found), dtype=torch.uint8)


def decode(data: Tensor, grid: Grid, bits: int | Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the codes of a stream: the inverse of `encode`.

    Args:
        data: uint8 (bytes,).
        grid: The codes' grid.
        bits: As given to `encode`.
        shape: Rows and columns.

    Returns:
        uint8 of that shape.

    Raises:
        StreamError: If no codes gave these bytes.
        MissingPackageError: If the range coder's library is not installed.
    """
    raw = data.cpu().numpy().tobytes()
    if len(raw) < HEAD or len(raw) % 4 != HEAD % 4 or raw[4] not in _WAYS:
        raise StreamError("its head is none of a stream")
    matrix = np.zeros(shape, np.uint8)
    end = _Decoder(raw[HEAD:])
    try:
        _walk(end, matrix, grid, bits, raw[4])
    except (ValueError, AssertionError, OverflowError) as error:
        raise StreamError(str(error)) from error
    if end.left():
        raise StreamError("it goes on behind its last code")
    if zlib.crc32(matrix.data) != int.from_bytes(raw[:4], "little"):
        raise StreamError("its codes differ from their checksum")
    return torch.from_numpy(matrix)


def _encoded(matrix: Codes, grid: Grid, bits: int | Tensor, way: int) -> bytes:
    end = _Encoder()
    _walk(end, matrix.copy(), grid, bits, way)
    return bytes([way]) + end.words()


def _walk(end: _End, matrix: Codes, grid: Grid, bits: int | Tensor, way: int) -> None:
    """Take a matrix of codes through an end of a stream, in place: rows of one width after the other."""
    if not matrix.size:
        return
    for index, levels in _by_width(grid, bits, len(matrix)):
        coding = _Coding(end, CLASSES if way in (_ALONG, _ACROSS) else 1, levels + 1)
        middle = _middle(grid, levels, index) * (way != _PLAIN)
        for start in range(0, len(index), _ROWS):
            rows = index[start : start + _ROWS]
            part, own = matrix[rows], middle[start : start + _ROWS, None]
            if way == _ACROSS:
                matrix[rows] = _coded(coding, np.ascontiguousarray(part.T), own.T).T
            else:
                matrix[rows] = _coded(coding, part, own)


def _by_width(grid: Grid, bits: int | Tensor, rows: int) -> Iterator[tuple[Ints, int]]:
    """Yield the rows of each width above 0, and their levels."""
    if not isinstance(bits, Tensor):
        yield np.arange(rows), int(grid.levels)
        return
    widths = bits.cpu().numpy()
    for width in range(1, 9):
        index = np.flatnonzero(widths == width)
        if len(index):
            yield index, (1 << width) - 1


def _middle(grid: Grid, levels: int, index: Ints) -> Ints:
    """Return twice the code of zero of some rows, rounded."""
    if grid.zero is None:
        return np.full(len(index), 2 * int(symmetric_zero(levels)), np.int64)
    zero = grid.zero[:, :1].double() if grid.zero.shape[1] else grid.zero.new_zeros(len(index), 1)
    twice = (2 * zero).clamp(0, 2 * levels).round().to(torch.int64)[:, 0].cpu().numpy()
    found: Ints = twice[index] if len(twice) > 1 else np.full(len(index), twice[0])
    return found


class _Coding:
    """Codes of one alphabet through an end of a stream, each by what is foretold of its class."""

    def __init__(self, end: _End, classes: int, alphabet: int) -> None:
        self.classes, self.alphabet = classes, alphabet
        self._end, self._frequencies = end, Frequencies(classes, alphabet)
        self._make = coder_library().stream.model.Categorical
        self._models: dict[int, Any] = {}

    def line_(self, codes: _Run, classes: Codes | None) -> None:
        """Code a line in place, a part at a time; without classes all codes are of the first."""
        start = 0
        while start < len(codes):
            part = slice(start, start + self._frequencies.together)
            own = None if classes is None else classes[part]
            if own is None:
                codes[part] = self._run(0, codes[part])
            else:
                self._sorted_(codes[part], own)
            self._frequencies.add_(codes[part], own)
            if self._frequencies.follow_():
                self._models.clear()
            start = part.stop

    def _sorted_(self, codes: _Run, classes: Codes) -> None:
        order = np.argsort(classes, kind="stable")
        picked, at = codes[order], 0
        for index, count in enumerate(np.bincount(classes).tolist()):
            if count:
                picked[at : at + count] = self._run(index, picked[at : at + count])
                at += count
        codes[order] = picked

    def _run(self, index: int, run: _Run) -> _Run:
        if index not in self._models:  # whole numbers below 2**24 are exact in float32
            frequencies = self._frequencies.of(index).astype(np.float32)
            self._models[index] = self._make(frequencies, perfect=False)
        return self._end.code(run, self._models[index])


def _coded(coding: _Coding, matrix: Codes, middle: Ints) -> Codes:
    """Return a matrix that has gone through an end of a stream, line by line.

    What is coded of a code is how far it lies behind half of `middle`, that of zero, round the alphabet's end: so rows
    whose zeros are different codes are alike.
    """
    lines, alphabet = Lines(*matrix.shape), coding.alphabet
    held = lines.split(matrix)
    around = Surroundings(lines, middle) if coding.classes > 1 else None
    for line in range(lines.count):
        codes = held[line, :, : lines.width(line)]
        zero = (lines.of(middle, line) >> 1).astype(np.int32)
        behind = codes - zero
        behind[behind < 0] += alphabet
        run = behind.reshape(-1)
        coding.line_(run, None if around is None else around.classes(line).reshape(-1))
        found = run.reshape(codes.shape) + zero
        found[found >= alphabet] -= alphabet
        codes[:] = found
        if around is not None:
            around.add_(line, codes)
    return lines.join(held)
