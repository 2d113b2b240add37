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
    best, least = coded, error.of(coded)
    for _ in range(sweeps):
        slope = error.slope(best.values().to(error.hessian.dtype))
        moved, slope = descend(error.hessian, slope, best)
        moved = rescale(error.hessian, slope, moved)
        after = error.of(moved)
        gain = (least - after).clamp(min=0).sum()
        better = moved.takes(after < least)
        best, least = moved.where(better, best), torch.where(better, after, least)
        if gain <= _ENOUGH * least.sum():
            break
    return best


def descend(hessian: Tensor, slope: Tensor, coded: Coded) -> tuple[Coded, Tensor]:
    """Return codes after one visit to every column, and the slope there.

    Args:
        hessian: (columns, columns).
        slope: (rows, columns): of the error at these codes.
        coded: The codes, whose grid stays.
    """
    rows, columns = coded.codes.shape
    scale, _, top = wide_grid(coded.grid, rows, columns, hessian.dtype)
    current, slope = coded.codes.T.to(hessian.dtype).contiguous(), slope.T.contiguous()
    curve = hessian.diagonal()[:, None] * scale
    rate = torch.where(curve > 0, 1 / curve, 0.0)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        inner = hessian[start:stop, start:stop]
        local, old = slope[start:stop].clone(), current[start:stop].clone()
        for i in range(stop - start):
            j = start + i
            code = (current[j] - local[i] * rate[j]).round_().clamp_(min=0)
            code = torch.minimum(code, top)
            local[i:].addr_(inner[i, i:], (code - current[j]).mul_(scale[j]))
            current[j] = code
        moved = (current[start:stop] - old).mul_(scale[start:stop])
        slope.addmm_(hessian[:, start:stop], moved)
    return replace(coded, codes=current.T.to(torch.uint8).contiguous()), slope.T


def rescale(hessian: Tensor, slope: Tensor, coded: Coded) -> Coded:
    """Return the codes on the grid whose scales (and zeros) are best for them, one group after the other.

    A group changes only where that lowers its row's output error, rounded to the grid's dtype. A grid
    that all rows share stays.
    """
    codes, grid = coded.codes, coded.grid
    rows, columns = codes.shape
    if grid.scale.shape[0] != rows:
        return coded
    work = hessian.dtype
    slope = slope.clone()
    scales = grid.scale.clone()
    zeros = None if grid.zero is None else grid.zero.clone()
    for g, start in enumerate(range(0, columns, grid.group_size)):
        part = slice(start, min(start + grid.group_size, columns))
        inner, q = hessian[part, part], codes[:, part].to(work)
        scale, zero = grid.scale[:, g].to(work), _zero_of(grid, g, work)
        shifted = q - zero[:, None]
        now = shifted * scale[:, None]
        a, z = _fit(q, shifted, now @ inner - slope[:, part], inner, zeros is None)
        a = a.to(scales.dtype)
        z = zero if zeros is None else (z / a.to(work)).to(zeros.dtype).to(work)
        change = (q - z[:, None]) * a.to(work)[:, None] - now
        delta = ((change @ inner) * change).sum(1) + 2 * (slope[:, part] * change).sum(1)
        good = (delta < 0) & (a > 0) & torch.isfinite(delta) & torch.isfinite(z)
        scales[:, g] = torch.where(good, a, scales[:, g])
        if zeros is not None:
            zeros[:, g] = torch.where(good, z.to(zeros.dtype), zeros[:, g])
        if grid.group_size < columns:
            slope.addmm_(torch.where(good[:, None], change, 0.0), hessian[part])
    return Coded(codes, replace(grid, scale=scales, zero=zeros))


def _zero_of(grid: Grid, g: int, dtype: torch.dtype) -> Tensor:
    if grid.zero is not None:
        return grid.zero[:, g].to(dtype)
    zero = torch.as_tensor(symmetric_zero(grid.levels), device=grid.scale.device)
    return zero.reshape(-1).to(dtype).expand(grid.scale.shape[0])


def _fit(
    q: Tensor, shifted: Tensor, goal: Tensor, inner: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Return a and b for which `a q - b` (symmetric: `a shifted`) has the least error in a group."""
    if symmetric:
        a = (shifted * goal).sum(1) / ((shifted @ inner) * shifted).sum(1)
        return a, torch.zeros_like(a)
    qh, ones = q @ inner, inner.sum(1)
    qq, q1, one = (qh * q).sum(1), (q * ones).sum(1), ones.sum()
    r0, r1 = (q * goal).sum(1), goal.sum(1)
    a = (r0 * one - r1 * q1) / (qq * one - q1 * q1)
    return a, (a * q1 - r1) / one
