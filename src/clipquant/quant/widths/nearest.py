"""One weight rounded to nearest at every width at once, each row on the range of least weighted error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, group
from clipquant.quant.widths.sensitivity import row_losses
from clipquant.quant.widths.table import RowTable

_SHRINKS = (17, 0.2)  # of the range at 1 to 4 bits: how many, and the least
_FEW_SHRINKS = (9, 0.7)  # at 5 bits and more, where the best range is nearly the whole
_REFITS = 6


def nearest_rows(
    matrix: Tensor, fisher: Tensor, widths: Sequence[int], group_size: int
) -> RowTable:
    """Return a weight rounded to nearest at several widths, for one whose inputs are not known.

    Args:
        matrix: Floating (rows, columns).
        fisher: E[g^2] of each weight, (rows, columns): what its squared error counts.
        widths: Of 0 to 8 bits.
        group_size: Neighbouring columns that share a scale.

    Source:
        Omega = 1/2 sum E[g^2] (w - q)^2: LeCun et al. 1990 ("Optimal Brain Damage").
    """
    matrix, weight = matrix.float(), column_weights(fisher)
    grids = {width: range_grid(matrix, weight, width, group_size) for width in widths}
    dtype = torch.float16
    for grid in grids.values():
        dtype = torch.promote_types(dtype, grid.scale.dtype)
    grids = {width: grid.to(dtype) for width, grid in grids.items()}
    coded = {width: Coded.nearest(matrix, grid) for width, grid in grids.items()}
    errors = 2 * row_losses(matrix, fisher, lambda width: coded[width].values(), widths)
    return RowTable(coded, errors, {}, "mse")


def column_weights(fisher: Tensor) -> Tensor:
    """Return how much an error in each column matters, (1, columns): the rows' mean of E[g^2].

    For a linear layer E[g^2] of a row is close to E[x^2] times a number of the row, so this is the
    activations' second moment, free of the noise of single elements. 1 % of the mean is added, and
    where all is 0 every column counts the same.
    """
    mean = fisher.mean(0, keepdim=True)
    total = mean.mean()
    return mean / total + 0.01 if total > 0 else torch.ones_like(mean)


def range_grid(matrix: Tensor, weight: Tensor, width: int, group_size: int) -> Grid:
    """Return the grid of least weighted squared error: a search over ranges, then least squares.

    Args:
        matrix: Floating (rows, columns).
        weight: (1, columns): how much an error in each column matters.
        width: 0 to 8 bits; 0 gives each group's weighted mean.
        group_size: Neighbouring columns that share a scale.

    Returns:
        Its grid, in float16 where that moves no end of a range by more than a quarter of a step and
        leaves constant groups exact, else in float32.

    >>> range_grid(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.ones(1, 4), 2, 4).scale
    tensor([[1.]], dtype=torch.float16)
    """
    values = group(matrix, group_size)
    counts = group(weight, group_size).clone()
    short = values.shape[1] * group_size - matrix.shape[1]
    if short:
        counts[:, -1, -short:] = 0
    counts = counts.expand_as(values)
    mean = (counts * values).sum(2) / counts.sum(2)
    low, high = values.aminmax(dim=2)
    if width == 0:
        mean = torch.where(low == high, low, mean)
        return _narrow(mean, torch.full_like(mean, -1.0), 0, group_size, low == high)
    steps = (1 << width) - 1
    count, least = _SHRINKS if width <= 4 else _FEW_SHRINKS
    best = _Fit(low * 0, low * 0, torch.full_like(low, torch.inf))
    for share in torch.linspace(1.0, least, count).tolist():
        scale = (high - low) * share / steps
        best = best.better(
            _measured(values, counts, scale, (high + low - scale * steps) / 2, steps)
        )
    for _ in range(_REFITS):
        best = best.better(_refit(values, counts, best, steps))
    constant = (low == high) | (best.scale <= 0)
    scale = torch.where(constant, torch.where(low == high, low, mean), best.scale)
    zero = torch.where(constant, -1.0, -best.low / torch.where(constant, 1.0, scale))
    return _narrow(scale, zero, steps, group_size, low == high)


@dataclass(frozen=True)
class _Fit:
    """Candidate grids `low + scale * q` with their weighted errors, each (rows, groups)."""

    scale: Tensor
    low: Tensor
    error: Tensor

    def better(self, other: _Fit) -> _Fit:
        worse = ~(other.error < self.error)
        return _Fit(
            torch.where(worse, self.scale, other.scale),
            torch.where(worse, self.low, other.low),
            torch.where(worse, self.error, other.error),
        )


def _codes(values: Tensor, scale: Tensor, low: Tensor, steps: int) -> Tensor:
    step = torch.where(scale > 0, scale, torch.inf)
    return ((values - low.unsqueeze(2)) / step.unsqueeze(2)).round_().clamp_(0, steps)


def _measured(values: Tensor, counts: Tensor, scale: Tensor, low: Tensor, steps: int) -> _Fit:
    q = _codes(values, scale, low, steps)
    error = q.mul_(scale.unsqueeze(2)).add_(low.unsqueeze(2)).sub_(values).square_().mul_(counts)
    return _Fit(scale, low, error.sum(2))


def _refit(values: Tensor, counts: Tensor, fit: _Fit, steps: int) -> _Fit:
    """Return the least-squares line through the codes that a fit gives."""
    q = _codes(values, fit.scale, fit.low, steps)
    total = counts.sum(2)
    mean_q, mean_w = (counts * q).sum(2) / total, (counts * values).sum(2) / total
    spread = q - mean_q.unsqueeze(2)
    variance = (counts * spread.square()).sum(2)
    scale = (counts * spread * values).sum(2) / torch.where(variance > 0, variance, torch.inf)
    return _measured(values, counts, scale, mean_w - scale * mean_q, steps)


def _narrow(scale: Tensor, zero: Tensor, steps: int, group_size: int, exact: Tensor) -> Grid:
    """Return the grid in float16 where that moves little and leaves constants as they are."""
    half = scale.to(torch.float16)
    fits = (half == scale) | ~exact
    fits &= (half.abs() >= 2.0**-14) & torch.isfinite(half) | (scale == 0)
    moved = zero * scale / torch.where(half == 0, 1.0, half.float())
    zero_half = torch.where((half == 0) | (zero == -1), zero, moved)
    if bool((fits & (zero_half.abs() <= 512)).all()):
        return Grid(half, zero_half.to(torch.float16), steps, group_size)
    return Grid(scale, zero, steps, group_size)
