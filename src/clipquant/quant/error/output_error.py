"""The squared output error of a matrix's codes, and the better of several codes by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows

BLOCK = 128  # columns decided between two updates of all the others


@dataclass(frozen=True)
class OutputError:
    """The squared output error of each row q of a matrix: `q H q^T - 2 q goal^T + energy`.

    Args:
        hessian: (columns, columns): E[x x^T] of the inputs x.
        goal: (rows, columns): E[y x^T] of the outputs y wanted.
        energy: (rows,): E[y^2].
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor

    def slope(self, values: Tensor) -> Tensor:
        """Return half the gradient of the error at some (rows, columns) values."""
        return torch.addmm(self.goal, values, self.hessian, beta=-1)

    def of(self, values: Tensor, slope: Tensor | None = None) -> Tensor:
        """Return the error of each row of (rows, columns) values; `slope` saves its making.

        >>> error = OutputError(torch.eye(2), torch.ones(1, 2), torch.tensor([2.0]))
        >>> error.of(torch.tensor([[1.0, 0.0]]))
        tensor([1.])
        """
        slope = self.slope(values) if slope is None else slope
        return (values * (slope - self.goal)).sum(1) + self.energy

    def of_codes(self, codes: Tensor, grid: Grid) -> Tensor:
        return self.of(dequantize_rows(codes, grid).to(self.hessian.dtype))

    def damped(self, matrix: Tensor, damping: float) -> OutputError:
        """Return the error with a pull towards the float weights, which makes H invertible.

        Args:
            matrix: (rows, columns): the float weights.
            damping: The pull, as a share of H's mean diagonal; inputs that are always zero get the mean.
        """
        diagonal = self.hessian.diagonal()
        live = diagonal > 0
        mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
        pull = torch.where(live, damping * mean, (1 + damping) * mean)
        hessian = self.hessian.clone()
        hessian.diagonal().add_(pull)
        goal = torch.addcmul(self.goal, matrix.to(pull.dtype), pull)
        return OutputError(hessian, goal, self.energy + (matrix.square() * pull).sum(1))


def best_of(
    error: OutputError, candidates: Iterable[tuple[Tensor, Grid]]
) -> tuple[Tensor, Grid, Tensor]:
    """Return for each row the candidate of least output error, and those errors.

    Candidates are codes with their grid. A grid that all rows share is chosen as a whole.
    """
    best: tuple[Tensor, Grid, Tensor] | None = None
    for codes, grid in candidates:
        found = error.of_codes(codes, grid)
        if best is None:
            best = codes, grid, found
            continue
        better = found < best[2]
        if grid.scale.shape[0] == 1 and len(found) > 1:
            better = (found.sum() < best[2].sum()).expand(len(found))
        best = mixed(better, (codes, grid, found), best)
    if best is None:
        raise ValueError("best_of needs one candidate or more; got none.")
    return best


def mixed(
    first: Tensor, one: tuple[Tensor, Grid, Tensor], other: tuple[Tensor, Grid, Tensor]
) -> tuple[Tensor, Grid, Tensor]:
    """Return `one` in the rows where `first` is true and `other` in the rest."""
    rows = first[:, None]
    if one[1].scale.shape[0] == 1 and len(first) > 1:
        return one if first.all() else other
    zero, dtype = None, torch.promote_types(one[1].scale.dtype, other[1].scale.dtype)
    mine, theirs = one[1].to(dtype), other[1].to(dtype)
    if mine.zero is not None and theirs.zero is not None:
        zero = torch.where(rows, mine.zero, theirs.zero)
    scale = torch.where(rows, mine.scale, theirs.scale)
    codes = torch.where(rows, one[0], other[0])
    return codes, replace(mine, scale=scale, zero=zero), torch.where(first, one[2], other[2])
