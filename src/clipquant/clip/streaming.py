"""Clamps of plain gradients, piece by piece: what a piece is read for again, it is read for from the cache."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from clipquant.clip.later import Later
from clipquant.clip.measured import Measured
from clipquant.clip.norms import flat, norms_of_rows, vector_norm
from clipquant.clip.outcome import Outcome
from clipquant.clip.pieces import Piece, Pieces, square_of

_PIECE = 1 << 20  # elements of a large tensor that are worked on at a time
_TINY = (
    1 << 12
)  # elements; below, a call costs more than the copy that lets one call serve many tensors
_CHUNK = 1 << 18  # elements of tiny tensors that are joined
_ROW = 1024


def as_vectors(tensors: Sequence[Tensor]) -> list[Tensor] | None:
    """Return float32 tensors of a CPU, large ones as vectors of the same memory; None where one is of another kind."""
    vectors: list[Tensor] = []
    for tensor in tensors:
        if type(tensor) is not Tensor or tensor.dtype is not torch.float32 or not tensor.is_cpu:
            return None
        if tensor.is_inference():
            return None
        if tensor.layout is not torch.strided:
            return None
        tiny = tensor.numel() <= _TINY and tensor.is_contiguous()
        vector = tensor if tiny else flat(tensor)
        if vector is None:
            return None
        vectors.append(vector)
    return vectors


class Clamping:
    """A clamp of many vectors, and what it has come to so far.

    Args:
        limit: Largest magnitude of an element.
        leave: Whether pieces with a non-finite element are left as they are.
        measure: Whether to sum the squares before.
        again: Whether to sum the squares after.
        count: Number of vectors.
    """

    def __init__(self, limit: float, leave: bool, measure: bool, again: bool, count: int) -> None:
        self.limit, self.leave, self.measure, self.again = limit, leave, measure, again
        self.clipped, self.finite = False, True
        self.before, self.after = [0.0] * count, [0.0] * count
        self._tiny: list[Piece] = []

    def outcome(self, tensors: Sequence[Tensor]) -> Outcome:
        """Return what it came to for these tensors, which the vectors share their memory with."""
        if not self.measure:
            return Outcome(self.clipped, self.finite)
        before: Measured = Pieces(len(self.before), self._tiny, self.before)
        after = before
        if self.clipped and not self.again:
            after = Later(tensors)
        elif self.clipped:
            after = Pieces(len(self.after), self._tiny, self.after, self.limit)
        return Outcome(self.clipped, self.finite, before, after)

    def large_(self, owner: int, vector: Tensor) -> None:
        """Clamp a vector piece by piece."""
        for piece in vector.split(_PIECE) if vector.numel() > _PIECE else (vector,):
            within, square = self._look(piece)
            self.before[owner] += square
            if not within:
                piece.clamp_(-self.limit, self.limit)
                self.clipped = True
                square = square_of(piece) if self.again else 0.0
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
            square = square_of(piece)
            if square < math.inf:  # a clamp changes nothing that is within
                return square <= self.limit**2 * (1 - 1e-3), square
        least, most = torch.aminmax(piece)
        low, high = least.item(), most.item()
        if not (low > -math.inf and high < math.inf):
            self.finite = False
            return self.leave, square if square != square else math.inf
        if square == math.inf:
            square = square_of(piece)
        return -self.limit <= low and high <= self.limit, square

    def tiny_(self, owners: Sequence[int], vectors: list[Tensor]) -> None:
        """Clamp vectors that are small, joined for all that is to be found out about them."""
        joined = _flatten_dense_tensors(vectors)
        least, most = torch.aminmax(joined)
        low, high = least.item(), most.item()
        finite = low > -math.inf and high < math.inf
        self.finite = self.finite and finite
        within = -self.limit <= low and high <= self.limit
        within = within or (self.leave and not finite)
        if self.measure:
            values = joined if len(vectors) > 1 else joined.clone()  # a view of a single one
            self._tiny.append(Piece(owners, [vector.numel() for vector in vectors], values))
        if not within:
            torch._foreach_clamp_min_(vectors, -self.limit)
            torch._foreach_clamp_max_(vectors, self.limit)
            self.clipped = True


def clamp_plain_(
    tensors: Sequence[Tensor], limit: float, leave: bool, measure: bool, later: bool
) -> Outcome | None:
    """Clamp every element of float32 tensors of a CPU in place.

    Args:
        tensors: Gradients.
        limit: Largest magnitude of an element.
        leave: Whether what is not finite is left as it is.
        measure: Whether to return norms of order 2.
        later: Whether norms after clipping may be left to whoever reads them, while the gradients are there.

    Returns:
        The outcome on this process; None, and nothing changed, where a tensor is of another kind.

    Example:
        >>> gradient = torch.tensor([3.0, 0.5])
        >>> clamp_plain_([gradient], 1.0, True, False, False).clipped, gradient
        (True, tensor([1.0000, 0.5000]))
    """
    vectors = as_vectors(tensors)
    if vectors is None:
        return None
    clamping = Clamping(limit, leave, measure, measure and not later, len(vectors))
    for owners in _chunks([vector.numel() for vector in vectors]):
        clamping.tiny_(owners, [vectors[owner] for owner in owners])
    for i, vector in enumerate(vectors):
        if vector.numel() > _TINY:
            clamping.large_(i, vector)
    return clamping.outcome(tensors)


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
