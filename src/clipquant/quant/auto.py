"""Weights with bits of their own for every row: sensitivities, grids and the allocation between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipquant.quant.allocate import WIDTHS, Choices, Frontier, frontier
from clipquant.quant.grid import Grid, dequantize_rows, from_codes, group, quantize_rows
from clipquant.quant.layers import Selection, Target
from clipquant.quant.model import QuantizedWeights, rest_of
from clipquant.quant.sensitivity import row_losses
from clipquant.quant.spec import QuantizedTensor

METHOD = "mse"
_SHRINKS = (33, 0.2)  # of the range at 1 to 4 bits: how many, and the least
_FEW_SHRINKS = (9, 0.7)  # at 5 bits and more, where the best range is nearly the whole
_REFITS = 6


@dataclass(frozen=True)
class Allocator:
    """A model's weights on grids of every width, and what each row loses at each.

    Args:
        model: The float model.
        selection: What of it is quantized.
        grids: Name of a weight -> its grid at 0 to 8 bits.
        frontier: The best allocations.
    """

    model: nn.Module
    selection: Selection
    grids: Mapping[str, tuple[Grid, ...]]
    frontier: Frontier

    def weights(self, bits: Mapping[str, Tensor]) -> QuantizedWeights:
        """Return the weights with these widths, uint8 (rows,) a weight."""
        tensors = {
            target.name: _take(target, self.grids[target.name], bits[target.name])
            for target in self.selection.targets
        }
        floats = rest_of(self.model, tensors, self.selection.aliases)
        return QuantizedWeights(tensors, floats, self.selection.aliases, self.selection.left)

    def uniform(self, width: int) -> dict[str, Tensor]:
        """Return one width for all rows, but for weights whose width is given."""
        return {
            name: torch.full(
                (len(choice.losses),),
                width if width in choice.widths else choice.widths[0],
                dtype=torch.uint8,
            )
            for name, choice in self.frontier.choices.items()
        }

    def sensitivities(self, bits: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the expected increase of the loss by each weight's rounding."""
        return {
            name: float(choice.losses.gather(1, bits[name].long()[:, None]).sum())
            for name, choice in self.frontier.choices.items()
        }


def allocator(
    model: nn.Module,
    selection: Selection,
    fisher: Mapping[str, Tensor],
    *,
    group_size: int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> Allocator:
    """Return the grids of every weight at every width, and the frontier of their allocations.

    Args:
        model: The float model.
        selection: What of it is quantized.
        fisher: Name of a weight -> E[g^2], (rows, columns).
        group_size: Weights of a row that share a scale. None: the whole row.
        fixed: Name of a weight -> its width, where it is given.
    """
    grids, choices = {}, {}
    for target in selection.targets:
        matrix = target.layout.fold(target.weight.detach()).float().cpu()
        size = min(group_size or target.layout.columns, target.layout.columns)
        own = fisher[target.name]
        weight = column_weights(own)
        found = tuple(range_grid(matrix, weight, width, size) for width in range(WIDTHS))
        given = (fixed or {}).get(target.name)
        widths = tuple(range(WIDTHS)) if given is None else (given,)
        losses = row_losses(matrix, own, lambda b, m=matrix, g=found: _rounded(m, g[b]), widths)  # type: ignore[misc]
        grids[target.name] = found
        choices[target.name] = Choices(target.layout.columns, losses, widths)
    return Allocator(model, selection, grids, frontier(choices))


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
        Its grid, in float16 where that moves no end of a range by more than a quarter of a step.

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
        return _narrow(mean, torch.full_like(mean, -1.0), 0, group_size)
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
    scale = torch.where(constant, mean, best.scale)
    zero = torch.where(constant, -1.0, -best.low / torch.where(constant, 1.0, scale))
    return _narrow(scale, zero, steps, group_size)


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


def _narrow(scale: Tensor, zero: Tensor, steps: int, group_size: int) -> Grid:
    half = scale.to(torch.float16)
    fits = (half.abs() >= 2.0**-14) & torch.isfinite(half) | (scale == 0)
    moved = zero * scale / torch.where(half == 0, 1.0, half.float())
    zero_half = torch.where((half == 0) | (zero == -1), zero, moved)
    if bool((fits & (zero_half.abs() <= 512)).all()):
        return Grid(half, zero_half.to(torch.float16), steps, group_size)
    return Grid(scale, zero, steps, group_size)


def _rounded(matrix: Tensor, grid: Grid) -> Tensor:
    return dequantize_rows(quantize_rows(matrix, grid), grid)


def _take(target: Target, grids: tuple[Grid, ...], bits: Tensor) -> QuantizedTensor:
    """Return a weight whose rows stand on the grids of their widths."""
    matrix = target.layout.fold(target.weight.detach()).float().cpu()
    dtype = torch.float16
    if any(grid.scale.dtype != torch.float16 for grid in grids):
        dtype = torch.float32
    scale = torch.zeros_like(grids[0].scale, dtype=dtype)
    zero = torch.full_like(scale, -1.0)
    for width in bits.unique().tolist():
        own, grid = bits == width, grids[width]
        scale[own] = grid.scale[own].to(dtype)
        if grid.zero is not None:
            zero[own] = grid.zero[own].to(dtype)
    levels = (2 ** bits.long() - 1).unsqueeze(1)
    grid = Grid(scale, zero, levels, grids[0].group_size)
    codes = quantize_rows(matrix, grid)
    return from_codes(codes, grid, bits, target.layout, target.weight.dtype, METHOD)
