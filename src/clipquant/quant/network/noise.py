"""How much of what few samples show is chance."""

from __future__ import annotations

import torch
from torch import Tensor

_COLUMNS = 1024  # that are looked at: of wider inputs evenly spaced ones tell the same


class Noise:
    """How much the off-diagonal part of second moments differs from piece to piece of the data.

    Columns are scaled to like size, so that loud inputs do not drown quiet ones.

    Source:
        Schaefer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix estimation",
        with pieces of the data, whose positions may be alike, in place of single positions.
    """

    def __init__(self, first: Tensor) -> None:
        self.every = max(first.shape[2] // _COLUMNS, 1) | 1  # odd: meets all places of a kernel
        size = first[:, :, :: self.every].square().mean(1, keepdim=True)  # (groups, 1, columns)
        self.scale = torch.where(size > 0, size, torch.inf).rsqrt()
        self.pieces = 0
        self.squares, self.single = first.new_zeros(2).double()

    def add_(self, part: Tensor) -> None:
        """Add a piece by its sum of x x^T, (groups, columns, columns)."""
        self.pieces += 1
        self.squares = self.squares + self._whole(part)

    def add_gram_(self, x: Tensor) -> None:
        """Add a piece by its inputs, (groups, positions, columns), fewer than there are columns."""
        scaled = x[:, :, :: self.every] * self.scale
        squares = scaled.square()
        # each position as a piece of its own
        self.single = self.single + squares.sum(2).square().sum() - squares.square().sum()
        self.pieces += 1
        self.squares = self.squares + _off_diagonal_of(scaled)

    def share(self, total: Tensor) -> float:
        """Return the part of the square of the sum over all pieces, (groups, columns, columns), that is chance."""
        return self._share(self._whole(total))

    def share_few(self, inputs: Tensor) -> float:
        """Return the same of the sum that all the inputs, (groups, positions, columns), give."""
        return self._share(_off_diagonal_of(inputs[:, :, :: self.every] * self.scale))

    def _whole(self, total: Tensor) -> Tensor:
        return _off_diagonal(total[:, :: self.every, :: self.every] * self.scale * self.scale.mT)

    def _share(self, whole: Tensor) -> float:
        if self.pieces == 1:
            chance = self.single
        else:
            spread = self.squares - whole / self.pieces
            chance = spread * self.pieces / (self.pieces - 1)
        share = torch.where(whole > 0, chance / whole, 0.0)
        return float(share.clamp(0, 1))


def _off_diagonal_of(x: Tensor) -> Tensor:
    """Return the sum of the squares off the diagonal of `x^T x`, of (groups, positions, columns)."""
    gram = x @ x.mT
    return gram.square().sum() - x.square().sum(1).square().sum()


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the sum of the squares off the diagonal of (groups, columns, columns)."""
    return matrix.square().sum() - matrix.diagonal(dim1=1, dim2=2).square().sum()
