"""Clamps of plain gradients, piece by piece: what a piece is read for again, it is read for from the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from clipquant.clip.measured import Measured
from clipquant.clip.norms import flat, norms_of_rows, vector_norm
from clipquant.clip.outcome import Outcome

_PIECE = 1 << 20  # elements of a large tensor that are worked on at a time
_TINY = (
    1 << 12
)  # elements; below, a call costs more than the copy that lets one call serve many tensors
_CHUNK = 1 << 18  # elements of tiny tensors that are joined
_ROW = 1024
_LEAST = 1e-30  # below, squares of float32 lose digits


def as_vectors(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return float32 tensors of a CPU as vectors that share their memory; None where one is of another kind."""
    vectors: list[Tensor] = []
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return None
        vector = flat(tensor) if tensor.layout is torch.strided else None
        if vector is None:
            return None
        vectors.append(vector)
    return vectors


class Clamping:
    """A clamp of many vectors, and what it has come to so far.

    Args:
        limit: Largest magnitude of an element.
        leave: Whether pieces with a non-finite element are left as they are.
        measure: Whether to sum the squares before and after.
        count: Number of vectors.
    """

    def __init__(self, limit: float, leave: bool, measure: bool, count: int) -> None:
        self.limit, self.leave, self.measure = limit, leave, measure
        self.clipped, self.finite = False, True
        self.before, self.after = [0.0] * count, [0.0] * count

    def outcome(self) -> Outcome:
        """Return what it came to."""
        if not self.measure:
            return Outcome(self.clipped, self.finite)
        before = Measured(_roots(self.before), 2.0)
        after = Measured(_roots(self.after), 2.0) if self.clipped else before
        return Outcome(self.clipped, self.finite, before, after)

    def large_(self, owner: int, vector: Tensor) -> None:
        """Clamp a vector piece by piece."""
        for piece in vector.split(_PIECE) if vector.numel() > _PIECE else (vector,):
            within, square = self._look(piece)
            self.before[owner] += square
            if not within:
                piece.clamp_(-self.limit, self.limit)
                self.clipped = True
                square = _square(piece) if self.measure else 0.0
            self.after[owner] += square

    def _look(self, piece: Tensor) -> tuple[bool, float]:
        """Return whether a piece stays as it is, and the sum of its squares where that is asked for."""
        square = 0.0
        if self.measure and not self.clipped:
            rows = norms_of_rows(piece, 2.0) if piece.numel() >= _ROW else vector_norm(piece, 2)
            largest = rows.max().item()
            square = float(vector_norm(rows, 2.0, dtype=torch.float64)) ** 2
            if largest <= self.limit and largest < math.inf:
                return True, square
        elif self.measure:
            square = _square(piece)
            if square < math.inf:  # a clamp changes nothing that is within
                return square <= self.limit**2 * (1 - 1e-3), square
        least, most = torch.aminmax(piece)
        low, high = least.item(), most.item()
        if not (low > -math.inf and high < math.inf):
            self.finite = False
            return self.leave, square if square != square else math.inf
        if square == math.inf:
            square = _square_in_double(piece)
        return -self.limit <= low and high <= self.limit, square

    def tiny_(self, owners: Sequence[int], vectors: Sequence[Tensor]) -> None:
        """Clamp vectors that are small, joined for all that is to be found out about them."""
        joined = _flatten_dense_tensors(vectors)
        least, most = torch.aminmax(joined)
        low, high = least.item(), most.item()
        finite = low > -math.inf and high < math.inf
        self.finite = self.finite and finite
        within = -self.limit <= low and high <= self.limit
        within = within or (self.leave and not finite)
        if self.measure:
            before = _squares(joined, vectors)
            after = before
            if not within:
                after = _squares(joined.clamp(-self.limit, self.limit), vectors)
            for owner, old, new in zip(owners, before, after, strict=True):
                self.before[owner], self.after[owner] = old, new
        if not within:
            torch._foreach_clamp_min_(vectors, -self.limit)
            torch._foreach_clamp_max_(vectors, self.limit)
            self.clipped = True


def clamp_vectors_(vectors: Sequence[Tensor], limit: float, leave: bool, measure: bool) -> Outcome:
    """Clamp every element of float32 vectors of a CPU in place.

    Args:
        vectors: The vectors.
        limit: Largest magnitude of an element.
        leave: Whether what is not finite is left as it is.
        measure: Whether to return norms of order 2.

    Returns:
        The outcome on this process.

    Example:
        >>> vector = torch.tensor([3.0, 0.5])
        >>> clamp_vectors_([vector], 1.0, leave=True, measure=False).clipped, vector
        (True, tensor([1.0000, 0.5000]))
    """
    clamping = Clamping(limit, leave, measure, len(vectors))
    for owners in _chunks([vector.numel() for vector in vectors]):
        clamping.tiny_(owners, [vectors[owner] for owner in owners])
    for i, vector in enumerate(vectors):
        if vector.numel() > _TINY:
            clamping.large_(i, vector)
    return clamping.outcome()


def _chunks(sizes: Sequence[int]) -> Iterator[list[int]]:
    """Yield the indices of tiny vectors, as many at a time as are joined."""
    chunk: list[int] = []
    filled = 0
    for i, size in enumerate(sizes):
        if 0 < size <= _TINY:
            chunk.append(i)
            filled += size
            if filled >= _CHUNK:
                yield chunk
                chunk, filled = [], 0
    if chunk:
        yield chunk


def _squares(joined: Tensor, vectors: Sequence[Tensor]) -> list[float]:
    """Return the sum of squares of each of the vectors that `joined` is made of."""
    parts = joined.split([vector.numel() for vector in vectors])
    squares = torch.stack(torch._foreach_norm(parts)).double().square_()
    found: list[float] = squares.tolist()
    if math.inf not in found and not any(0.0 < square < _LEAST for square in found):
        return found
    return [_square_in_double(part) for part in parts]


def _square(piece: Tensor) -> float:
    """Return the sum of squares; infinite or NaN where an element is."""
    square: float = torch.dot(piece, piece).item()
    if _LEAST < square < math.inf or square == 0.0:
        return square
    return _square_in_double(piece)


def _square_in_double(piece: Tensor) -> float:
    wide = piece.double()
    square: float = torch.dot(wide, wide).item()
    return square


def _roots(squares: Sequence[float]) -> Tensor:
    """Return the norms whose squares are given, in float32 where that holds them."""
    norms = torch.tensor(squares, dtype=torch.float64, device="cpu").sqrt_()
    narrow = norms.float()
    return norms if bool((narrow.isinf() & norms.isfinite()).any()) else narrow
