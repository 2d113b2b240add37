"""How much of what few samples show is chance."""

from __future__ import annotations

import torch
from torch import Tensor


class Noise:
    """How much the off-diagonal part of second moments differs from piece to piece of the data.

    Columns are scaled to like size, so that loud inputs do not drown quiet ones.

    Source:
        Schaefer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix estimation",
        with pieces of the data, whose positions may be alike, in place of single positions.
    """

    def __init__(self, first: Tensor) -> None:
        size = first.square().mean(1, keepdim=True)  # (groups, 1, columns)
        self.scale = torch.where(size > 0, size, torch.inf).rsqrt()
        self.pieces, self.squares, self.single = 0, 0.0, 0.0

    def add_(self, part: Tensor) -> None:
        """Add a piece by its sum of x x^T, (groups, columns, columns)."""
        self._count_(_off_diagonal(part * self.scale * self.scale.mT))

    def add_gram_(self, x: Tensor) -> None:
        """Add a piece by its inputs, (groups, positions, columns), fewer than there are columns."""
        scaled = x * self.scale
        squares = scaled.square()
        lengths = squares.sum(2).square().sum() - squares.square().sum()
        self.single += float(lengths)  # each position as a piece of its own
        gram = scaled @ scaled.mT
        self._count_(gram.square().sum() - squares.sum(1).square().sum())

    def _count_(self, square: Tensor) -> None:
        self.pieces += 1
        self.squares += float(square)

    def share(self, total: Tensor) -> float:
        """Return the part of the square of the sum over all pieces that is chance."""
        whole = float(_off_diagonal(total * self.scale * self.scale.mT))
        if whole <= 0:
            return 0.0
        if self.pieces == 1:
            return min(self.single / whole, 1.0)
        spread = (self.squares - whole / self.pieces) * self.pieces / (self.pieces - 1)
        return min(max(spread / whole, 0.0), 1.0)


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the sum of the squares off the diagonal of (groups, columns, columns)."""
    return matrix.square().sum() - matrix.diagonal(dim1=1, dim2=2).square().sum()
