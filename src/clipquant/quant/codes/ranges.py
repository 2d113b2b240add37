"""Where a grid starts and ends: its scale and zero from the weights alone."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import (
    Coded,
    Grid,
    dequantize_rows,
    group,
    quantize_rows,
    row_chunks,
    symmetric_zero,
)
from clipquant.quant.codes.spec import QuantSpec

_SHIFT = {
    torch.float16: 0.25,
    torch.float32: 2.0**-10,
}  # how far, in steps, rounding may move an end


SHRINK = tuple(1 - 0.02 * i for i in range(41))  # 1 .. 0.2


def minmax_grid(matrix: Tensor, spec: QuantSpec) -> Grid:
    """Return the narrowest grid that no weight of a group exceeds; a constant group is exact.

    Args:
        matrix: Floating (rows, columns).
        spec: Steps, symmetry and granularity.

    Returns:
        Its grid, `scale = (max - min) / steps` and `zero = -min / scale`, or on a symmetric grid
        `scale = max(-min / zero, max / (steps - zero))`. A constant c has scale c and zero -1
        (symmetric: scale |c|), so that its one code gives c back to the last bit.

    Source:
        Jacob et al. 2018, arXiv 1712.05877, equations 1 to 3, with a fractional zero.

    >>> minmax_grid(torch.tensor([[-1.0, 0.5, 2.0]]), QuantSpec(bits=2)).scale
    tensor([[1.]])
    """
    low, high = extremes(matrix, spec)
    return narrow(grid_between(low, high, spec, matrix.shape[1]), low == high)


def extremes(matrix: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """Return each group's minimum and maximum in float64, (rows, groups), or (1, 1) a tensor."""
    if spec.granularity == "tensor":
        low, high = matrix.aminmax()
        return low.double().reshape(1, 1), high.double().reshape(1, 1)
    grouped = group(matrix, spec.group_size(matrix.shape[1]))
    return grouped.amin(2).double(), grouped.amax(2).double()  # each many times aminmax(dim=2)


def grid_between(low: Tensor, high: Tensor, spec: QuantSpec, columns: int) -> Grid:
    """Return the grid in float64 whose ends are `low` and `high`, both (rows, groups)."""
    constant = low == high
    if spec.symmetric:
        zero = symmetric_zero(spec.steps)
        scale = torch.maximum(-low / zero, high / (spec.steps - zero))
        return Grid(
            torch.where(constant, low.abs(), scale), None, spec.steps, spec.group_size(columns)
        )
    scale = torch.where(constant, low, (high - low) / spec.steps)
    zero = torch.where(constant, -1.0, -low / torch.where(constant, 1.0, scale))
    return Grid(scale, zero, spec.steps, spec.group_size(columns))


def narrow(grid: Grid, constant: Tensor) -> Grid:
    """Return the grid with scales in the smallest dtype that leaves it where it was.

    That is float16 where each group's range moves by at most a quarter of a step (codes are chosen
    on the rounded grid, so this costs range, not accuracy) and constants stay exact; else float32;
    else float64. A single scale for a whole tensor is not worth rounding and starts at float32.

    Args:
        grid: In float64.
        constant: bool (rows, groups): the groups of one value, which must be kept exactly.
    """
    candidates = [torch.float16, torch.float32] if grid.scale.numel() > 1 else [torch.float32]
    for dtype in candidates:
        rounded = recentre(grid, dtype, constant)
        if _shift(grid, rounded, constant) <= _SHIFT[dtype]:
            return rounded
    return grid.to(torch.float64)


def recentre(grid: Grid, dtype: torch.dtype, constant: Tensor) -> Grid:
    """Return the grid with scales rounded to `dtype`, and zeros such that the low ends stay."""
    scale = grid.scale.to(dtype)
    if grid.zero is None:
        return replace(grid, scale=scale)
    zero = torch.where(constant, -1.0, grid.zero * grid.scale / scale.double())
    return replace(grid, scale=scale, zero=zero.to(dtype))


def _shift(exact: Grid, rounded: Grid, constant: Tensor) -> float:
    """Return by how many steps an end of a range moves at most; infinite where a value is lost."""
    ratio = rounded.scale.double() / exact.scale
    device = ratio.device
    steps = torch.as_tensor(exact.levels, dtype=torch.float64, device=device)
    if exact.zero is None or rounded.zero is None:
        zero = torch.as_tensor(symmetric_zero(exact.levels), dtype=torch.float64, device=device)
        moved = (ratio - 1).abs() * torch.maximum(zero, steps - zero)
    else:
        low, high = -exact.zero, steps - exact.zero
        new_low = -rounded.zero.double() * ratio
        moved = torch.maximum((new_low - low).abs(), (new_low + steps * ratio - high).abs())
    lost = torch.where(rounded.scale.double() == exact.scale, 0.0, torch.inf)
    moved = torch.where(constant, lost, moved).nan_to_num(nan=torch.inf)
    return float(moved.max()) if moved.numel() else 0.0


def shrunk_grid(matrix: Tensor, spec: QuantSpec, factor: float) -> Grid:
    """Return the min-max grid with both ends drawn in by a factor; a constant group stays exact.

    >>> shrunk_grid(torch.tensor([[-1.0, 0.5, 2.0]]), QuantSpec(bits=2), 0.5).scale
    tensor([[0.5000]])
    """
    low, high = extremes(matrix, spec)
    constant = low == high
    low, high = (torch.where(constant, end, end * factor) for end in (low, high))
    return narrow(grid_between(low, high, spec, matrix.shape[1]), constant)


def mse_grid(matrix: Tensor, spec: QuantSpec, weight: Tensor | None = None) -> Grid:
    """Return, for each group, the shrunk min-max grid of least squared rounding error.

    Args:
        matrix: Floating (rows, columns).
        spec: Steps, symmetry and granularity.
        weight: (columns,) or (rows, columns): what a squared error counts, such as E[x^2] of the inputs.

    Source:
        Range search as in Nagel et al. 2021, arXiv 2106.08295, section 3.1, shrinking from 1 to 0.2.

    >>> outlier = torch.tensor([[0.0, 1.0, 2.0, 3.0] * 16 + [4.0]])
    >>> mse_grid(outlier, QuantSpec(bits=2)).scale < minmax_grid(outlier, QuantSpec(bits=2)).scale
    tensor([[True]])
    """
    low, high = extremes(matrix, spec)
    constant = low == high
    best = torch.full_like(low, torch.inf)
    first, last = low, high
    for factor in SHRINK:
        grid = grid_between(low * factor, high * factor, spec, matrix.shape[1])
        found = _group_error(matrix, grid, weight, spec)
        better = (found < best) & ~constant
        best = torch.where(better, found, best)
        first = torch.where(better, low * factor, first)
        last = torch.where(better, high * factor, last)
    return narrow(grid_between(first, last, spec, matrix.shape[1]), constant)


def _group_error(matrix: Tensor, grid: Grid, weight: Tensor | None, spec: QuantSpec) -> Tensor:
    grid = grid.to(torch.float64 if matrix.dtype == torch.float64 else torch.float32)
    error = dequantize_rows(quantize_rows(matrix, grid), grid).sub_(matrix).square_()
    if weight is not None:
        error *= weight
    if spec.granularity == "tensor":
        return error.sum().double().reshape(1, 1)
    columns = matrix.shape[1]
    short = -columns % grid.group_size
    return group(torch.nn.functional.pad(error, (0, short)), grid.group_size).sum(2).double()


def plain_rounding(matrix: Tensor, spec: QuantSpec) -> Coded:
    """Return a matrix rounded to the nearest values of its min-max grid (RTN).

    On a whole tensor's affine grid the codes are `round((w - min) / (max - min) * levels)`, evaluated in
    float64 as it is written, so that they are those of the reference definition to the last one.

    Args:
        matrix: Floating (rows, columns).
        spec: The grid asked for.

    >>> plain_rounding(torch.tensor([[-1.0, 0.0, 1.0]]), QuantSpec(8, 8, False, "tensor")).codes
    tensor([[0, 4, 8]], dtype=torch.uint8)
    """
    if spec.granularity != "tensor" or spec.symmetric:
        return Coded.nearest(matrix, minmax_grid(matrix, spec))
    low, high = extremes(matrix, spec)
    span = torch.where(high == low, 1.0, high - low)
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    for start, stop in row_chunks(*matrix.shape):
        rows = matrix[start:stop].double()
        codes[start:stop].copy_((rows - low).div_(span).mul_(spec.steps).round_())
    return Coded(codes, narrow(grid_between(low, high, spec, matrix.shape[1]), low == high))
