"""Descent on the output error: codes and scales by turns, from any codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, symmetric_zero, wide_grid
from clipquant.quant.error.output_error import BLOCK, OutputError

SWEEPS = 6
_ENOUGH = 1e-3  # a sweep that gains less than this share is the last


def refine(error: OutputError, coded: Coded, sweeps: int = SWEEPS) -> Coded:
    """Return codes on a grid with no row's error above that of those given.

    Descent: every column goes to its best code given all the others, then every group gets the scale
    (and zero) that is best for its codes; until little is gained.

    Args:
        error: What to lower.
        coded: Where to start.
        sweeps: Most times that this is done.

    Source:
        Behdin et al. 2023, arXiv 2309.01885 (QuantEase), with the scales fitted by least squares.

    >>> error = OutputError(torch.eye(2), torch.tensor([[0.0, 1.5]]), torch.tensor([2.25]))
    >>> start = Coded(torch.tensor([[0, 0]]).byte(), Grid(torch.ones(1, 1), torch.zeros(1, 1), 1, 2))
    >>> refined = refine(error, start)
    >>> refined.codes, refined.grid.scale
    (tensor([[0, 1]], dtype=torch.uint8), tensor([[1.5000]]))
    """
    best, values = coded, coded.values().to(error.hessian.dtype)
    slope = error.slope(values)
    least = error.at(values, slope)
    for _ in range(sweeps):
        moved, after_slope = _descended(_Slope(error, slope, values), best)
        moved, after_slope = rescale(error, after_slope, moved)
        values = moved.values().to(error.hessian.dtype)
        after = error.at(values, after_slope)
        gain = (least - after).clamp(min=0).sum()
        better = moved.takes(after < least)
        best, least = moved.where(better, best), torch.where(better, after, least)
        if gain <= _ENOUGH * least.sum():
            break
        slope = torch.where(better[:, None], after_slope, slope)
        values = best.values().to(error.hessian.dtype)
    return best


class _Slope:
    """Half the gradient of an output error, (columns, rows), while columns change."""

    def __init__(self, error: OutputError, slope: Tensor, values: Tensor) -> None:
        self.error, self.slope = error, slope.T.contiguous()
        self.values = values.T.contiguous() if error.inputs is not None else None
        self.seen = None if error.inputs is None else error.inputs @ values.T

    def at(self, part: slice) -> Tensor:
        """Return the slope of some columns, to be written to."""
        if self.seen is None or self.values is None or self.error.inputs is None:
            return self.slope[part].clone()
        own = self.error.hessian[part, None] * self.values[part] - self.error.goal.T[part]
        return own.addmm_(self.error.inputs[:, part].T, self.seen)

    def move_(self, part: slice, change: Tensor) -> None:
        """Take note of a change of some columns' values, (columns of the part, rows)."""
        if self.seen is None or self.values is None or self.error.inputs is None:
            self.slope.addmm_(self.error.hessian[:, part], change)
        else:
            self.seen.addmm_(self.error.inputs[:, part], change)
            self.values[part] += change

    def whole(self) -> Tensor:
        """Return the slope, (rows, columns)."""
        if self.seen is None or self.values is None or self.error.inputs is None:
            return self.slope.T
        own = self.error.hessian * self.values.T - self.error.goal
        return own.addmm_(self.seen.T, self.error.inputs)


def descend(hessian: Tensor, slope: Tensor, coded: Coded) -> tuple[Coded, Tensor]:
    """Return codes after one visit to every column, and the slope there.

    Args:
        hessian: (columns, columns).
        slope: (rows, columns): of the error at these codes.
        coded: The codes, whose grid stays.
    """
    return _descended(_Slope(OutputError(hessian, slope, slope[:, 0]), slope, slope), coded)


def _descended(slopes: _Slope, coded: Coded) -> tuple[Coded, Tensor]:
    rows, columns = coded.codes.shape
    dtype = slopes.slope.dtype
    scale, _, top = wide_grid(coded.grid, rows, columns, dtype)
    current = coded.codes.T.to(dtype).contiguous()
    curve = slopes.error.diagonal()[:, None] * scale
    rate = torch.where(curve > 0, 1 / curve, 0.0)
    for start in range(0, columns, BLOCK):
        part = slice(start, min(start + BLOCK, columns))
        inner = slopes.error.inner(part)
        local, old = slopes.at(part), current[part].clone()
        for i in range(part.stop - start):
            j = start + i
            code = (current[j] - local[i] * rate[j]).round_().clamp_(min=0)
            code = torch.minimum(code, top)
            local[i:].addr_(inner[i, i:], (code - current[j]).mul_(scale[j]))
            current[j] = code
        slopes.move_(part, (current[part] - old).mul_(scale[part]))
    codes = current.T.to(torch.uint8).contiguous()
    return replace(coded, codes=codes), slopes.whole()


def rescale(error: OutputError, slope: Tensor, coded: Coded) -> tuple[Coded, Tensor]:
    """Return the codes on the grid whose scales (and zeros) are best for them, and the slope there.

    A group changes only where that lowers its row's output error, rounded to the grid's dtype, one
    group after the other. A grid that all rows share stays.
    """
    codes, grid = coded.codes, coded.grid
    rows, columns = codes.shape
    if grid.scale.shape[0] != rows:
        return coded, slope
    work = error.hessian.dtype
    one = grid.group_size >= columns
    slopes = None if one else _Slope(error, slope, coded.values().to(work))
    scales = grid.scale.clone()
    zeros = None if grid.zero is None else grid.zero.clone()
    for g, start in enumerate(range(0, columns, grid.group_size)):
        part = slice(start, min(start + grid.group_size, columns))
        own = slope if slopes is None else slopes.at(part).T
        inner = None if one else error.inner(part)
        q, scale, zero = codes[:, part].to(work), grid.scale[:, g].to(work), _zero_of(grid, g, work)
        now = (q - zero[:, None]) * scale[:, None]
        if inner is None:  # of a whole row the product follows from the slope
            told, ones = own + error.goal, error.product(torch.ones_like(q[:1]))[0]
        else:
            told, ones = now @ inner, inner.sum(1)
        a, z, change, turned = _fit(q, now, own, told, ones, (scale, zero), (scales, zeros))
        delta = (turned * change).sum(1) + 2 * (own * change).sum(1)
        good = (delta < 0) & (a > 0) & torch.isfinite(delta) & torch.isfinite(z)
        scales[:, g] = torch.where(good, a, scales[:, g])
        if zeros is not None:
            zeros[:, g] = torch.where(good, z.to(zeros.dtype), zeros[:, g])
        if slopes is None:
            slope = torch.where(good[:, None], own + turned, own)
        else:
            slopes.move_(part, torch.where(good[:, None], change, 0.0).T)
    slope = slope if slopes is None else slopes.whole()
    return Coded(codes, replace(grid, scale=scales, zero=zeros)), slope


def _fit(
    q: Tensor,
    now: Tensor,
    slope: Tensor,
    told: Tensor,
    ones: Tensor,
    old: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return scale and zero of least error in a group, rounded; how values change, and H times that.

    Values are `a (q - z)`, so that what H makes of them follows from what it makes of those now.

    Args:
        q: Codes (rows, columns of the group).
        now: Their values.
        slope: Of the error there.
        told: `now H`.
        ones: H times ones.
        old: Scale and zero now, one a row.
        kept: Tensors of all scales and zeros, whose dtypes hold; no zeros on a symmetric grid.
    """
    (scale, zero), (scales, zeros) = old, kept
    goal = told - slope
    shifted, turned = q - zero[:, None], told / scale[:, None]
    if zeros is None:
        a = ((shifted * goal).sum(1) / (turned * shifted).sum(1)).to(scales.dtype)
        z = zero
    else:
        turned = turned + zero[:, None] * ones
        qq, q1, one = (turned * q).sum(1), (q * ones).sum(1), ones.sum()
        r0, r1 = (q * goal).sum(1), goal.sum(1)
        best = (r0 * one - r1 * q1) / (qq * one - q1 * q1)
        a = best.to(scales.dtype)
        z = ((best * q1 - r1) / one / a.to(q.dtype)).to(zeros.dtype).to(q.dtype)
    by = a.to(q.dtype)[:, None]
    change = (q - z[:, None]) * by - now
    if zeros is None:
        return a, z, change, turned * by - told
    return a, z, change, (turned - z[:, None] * ones) * by - told


def _zero_of(grid: Grid, g: int, dtype: torch.dtype) -> Tensor:
    if grid.zero is not None:
        return grid.zero[:, g].to(dtype)
    zero = torch.as_tensor(symmetric_zero(grid.levels), device=grid.scale.device)
    return zero.reshape(-1).to(dtype).expand(grid.scale.shape[0])
