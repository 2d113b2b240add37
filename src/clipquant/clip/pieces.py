"""Norms of gradients that were seen piece by piece."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from clipquant.clip.measured import Measured
from clipquant.clip.norms import combine_norms, value_norms

_LEAST = 1e-30  # below, squares of float32 lose digits


@dataclass(frozen=True)
class Piece:
    """What was seen of some gradients.

    Args:
        owners: Which gradients.
        sizes: How many of the values belong to each.
        values: Elements, or norms of parts; nobody changes them.
    """

    owners: Sequence[int]
    sizes: Sequence[int]
    values: Tensor


class Pieces(Measured):
    """Norms of order 2 made of pieces when somebody reads them, without a sum for each gradient before that.

    Args:
        count: Number of gradients.
        pieces: What was seen of them.
        squares: Sums of squares of other pieces, for each gradient.
        limit: Largest magnitude that the values of pieces count with.

    Example:
        >>> norms = Pieces(2, [Piece([1, 0], [1, 2], torch.tensor([12.0, 3.0, 4.0]))])
        >>> norms.total, norms.each.tolist()
        (13.0, [5.0, 12.0])
    """

    def __init__(
        self,
        count: int,
        pieces: Sequence[Piece],
        squares: Sequence[float] | None = None,
        limit: float = math.inf,
    ) -> None:
        super().__init__(torch.zeros(0, device="cpu"), 2.0)
        self._pieces = pieces
        self._squares = [0.0] * count if squares is None else squares
        self._most = limit

    @cached_property
    def each(self) -> Tensor:
        """Norm of each gradient, shape (number of gradients,), float32 where that holds them."""
        squares = torch.tensor(self._squares, dtype=torch.float64, device="cpu")
        for piece in self._pieces:
            parts = self._counting(piece.values).split(list(piece.sizes))
            own = value_norms(parts).double().square_()
            squares.index_add_(0, torch.tensor(piece.owners, device="cpu"), own)
        norms = squares.sqrt_()
        narrow = norms.float()
        return norms if bool((narrow.isinf() & norms.isfinite()).any()) else narrow

    @cached_property
    def norm(self) -> Tensor:
        """Norm of all gradients as one vector, a scalar tensor."""
        return combine_norms(self.each)

    @cached_property
    def total(self) -> float:
        """Norm of all gradients as one vector."""
        seen = sum(square_of(self._counting(piece.values)) for piece in self._pieces)
        return math.sqrt(seen + math.fsum(self._squares))

    def scaled(self, factor: float) -> Measured:
        """Return the norms of the gradients times a factor."""
        return Measured(self.each, factor=factor)

    def _counting(self, values: Tensor) -> Tensor:
        return values if self._most == math.inf else values.clamp(-self._most, self._most)


def square_of(values: Tensor) -> float:
    """Return the sum of squares of a vector; infinite or NaN where an element is.

    Example:
        >>> square_of(torch.tensor([3.0, 4.0])), square_of(torch.tensor([3e30, 4e30])) < math.inf
        (25.0, True)
    """
    square: float = torch.dot(values, values).item()
    if _LEAST < square < math.inf or (square == 0.0 and not bool(values.any())):
        return square
    wide = values.double()
    return float(torch.dot(wide, wide).item())
