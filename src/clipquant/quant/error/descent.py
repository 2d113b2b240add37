"""Descent on the output error: codes and scales by turns, from any codes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows, symmetric_zero, wide_grid
from clipquant.quant.error.output_error import BLOCK, OutputError, mixed

SWEEPS = 6
_ENOUGH = 1e-3  # a sweep that gains less than this share is the last


def refine(
    error: OutputError, codes: Tensor, grid: Grid, sweeps: int = SWEEPS
) -> tuple[Tensor, Grid]:
    """Return codes and a grid with no row's error above that of those given.

    Descent: every column goes to its best code given all the others, then every group gets the scale
    (and zero) that is best for its codes; until little is gained.

    Args:
        error: What to lower.
        codes: uint8 (rows, columns).
        grid: Their grid.
        sweeps: Most times that this is done.

    Source:
        Behdin et al. 2023, arXiv 2309.01885 (QuantEase), with the scales fitted by least squares.

    >>> error = OutputError(torch.eye(2), torch.tensor([[0.0, 1.5]]), torch.tensor([2.25]))
    >>> codes, grid = refine(error, torch.tensor([[0, 0]]).byte(), Grid(torch.ones(1, 1), torch.zeros(1, 1), 1, 2))
    >>> codes, grid.scale
    (tensor([[0, 1]], dtype=torch.uint8), tensor([[1.5000]]))
    """
    best = codes, grid, error.of_codes(codes, grid)
    for _ in range(sweeps):
        values = dequantize_rows(best[0], best[1]).to(error.hessian.dtype)
        slope = error.slope(values)
        found, slope = descend(error.hessian, slope, best[0], best[1])
        scaled = rescale(error.hessian, slope, found, best[1])
        after = error.of_codes(found, scaled)
        gain = (best[2] - after).clamp(min=0).sum()
        best = mixed(after < best[2], (found, scaled, after), best)
        if gain <= _ENOUGH * best[2].sum():
            break
    return best[0], best[1]


def descend(hessian: Tensor, slope: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return codes after one visit to every column, and the slope there.

    Args:
        hessian: (columns, columns).
        slope: (rows, columns): of the error at these codes.
        codes: uint8 (rows, columns).
        grid: Their grid.
    """
    rows, columns = codes.shape
    scale, _, top = wide_grid(grid, rows, columns, hessian.dtype)
    current, slope = codes.T.to(hessian.dtype).contiguous(), slope.T.contiguous()
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
    return current.T.to(torch.uint8).contiguous(), slope.T


def rescale(hessian: Tensor, slope: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """Return the grid whose scales (and zeros) are best for these codes, one group after the other.

    A group changes only where that lowers its row's output error, rounded to the grid's dtype. A grid
    that all rows share stays.
    """
    rows, columns = codes.shape
    if grid.scale.shape[0] != rows:
        return grid
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
    return replace(grid, scale=scales, zero=zeros)


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
