"""How a weight folds into rows: one for each output channel."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How a weight folds into a (rows, columns) matrix: one row an output channel, and back.

    Args:
        shape: Shape of the weight.
        axis: The output-channel axis: 0, or 1 for transposed convolutions. Of a stack of matrices, one an expert,
            -2 or -1: each matrix's outputs lie along that axis of it, and its rows follow those of the one before.
        groups: Groups of a transposed convolution, whose weight is (in, out / groups, ...).

    >>> layout = Layout((6, 2, 3, 3), axis=1, groups=2)
    >>> layout.rows, layout.columns
    (4, 27)
    >>> w = torch.arange(108.0).reshape(6, 2, 3, 3)
    >>> torch.equal(layout.unfold(layout.fold(w)), w)
    True
    >>> experts = Layout((2, 3, 5), axis=-1)
    >>> experts.rows, experts.columns
    (10, 3)
    """

    shape: tuple[int, ...]
    axis: int = 0
    groups: int = 1

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        if self.stacked:
            return math.prod(self.shape[:-2]) * self.shape[self.axis]
        return self.shape[0] if self.axis == 0 else self.shape[1] * self.groups

    @property
    def stacked(self) -> bool:
        """Whether the weight is a stack of matrices, one an expert."""
        return self.axis < 0

    @property
    def columns(self) -> int:
        return self.numel // self.rows if self.rows else 0

    def fold(self, weight: Tensor) -> Tensor:
        """Return `weight` of this layout's shape as a (rows, columns) matrix."""
        if self.axis == -1:
            weight = weight.mT
        if self.axis <= 0:
            return weight.reshape(self.rows, self.columns)
        grouped = weight.reshape(self.groups, self.shape[0] // self.groups, *self.shape[1:])
        return grouped.transpose(1, 2).reshape(self.rows, self.columns)

    def unfold(self, matrix: Tensor) -> Tensor:
        """Return the (rows, columns) `matrix` as a weight: the inverse of `fold`."""
        if self.axis == -1:
            return matrix.reshape(*self.shape[:-2], *self.shape[:-3:-1]).mT
        if self.axis <= 0:
            return matrix.reshape(self.shape)
        inputs = self.shape[0] // self.groups
        grouped = matrix.reshape(self.groups, self.shape[1], inputs, *self.shape[2:])
        return grouped.transpose(1, 2).reshape(self.shape)
