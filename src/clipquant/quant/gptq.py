"""Codes that keep a layer's output rather than its weights: GPTQ, then descent on the same error."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.grid import Grid, dequantize_rows, symmetric_zero

BLOCK = 128  # columns decided between two updates of all the others
SWEEPS = 6
_ENOUGH = 1e-3  # a sweep that gains less than this share is the last


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


@dataclass(frozen=True)
class Walk:
    """H factored for one order of deciding columns: what every grid tried on a layer shares.

    Args:
        order: (columns,): the column decided last comes first.
        lower: Lower Cholesky factor of H in that order, each column divided by its diagonal.
        wanted: (rows, columns), in that order: the float weights of least output error.
    """

    order: Tensor
    lower: Tensor
    wanted: Tensor


def plan_walk(error: OutputError) -> Walk:
    """Return the walk in descending order of H's diagonal ("act-order").

    Args:
        error: Damped.

    Raises:
        ValueError: If H cannot be factored at all, as with NaN in it.
    """
    order = error.hessian.diagonal().argsort(stable=True)
    hessian, damping = error.hessian[order][:, order], 0.0
    while True:
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not info.any():
            break
        damping = max(10 * damping, 1e-4)
        if not damping < 1e4:
            raise ValueError(
                "the inputs' second moments cannot be factored: they hold NaN or infinity."
            )
        hessian.diagonal().add_(damping * error.hessian.diagonal().mean())
    wanted = torch.cholesky_solve(error.goal[:, order].T, lower).T
    return Walk(order, lower.div_(lower.diagonal().clone()), wanted)


def gptq_codes(walk: Walk, grid: Grid) -> Tensor:
    """Return codes whose output error is low: each column makes up for those decided before it.

    GPTQ's update of the columns still open is Babai's nearest-plane walk along the Cholesky factor of
    H from its end, so H is factored once and never inverted.

    Args:
        walk: Order, factor and weights wanted.
        grid: The values allowed.

    Returns:
        uint8 (rows, columns).

    Source:
        Frantar et al. 2022, arXiv 2210.17323; Chen et al. 2025, arXiv 2507.18553 (Babai); weights
        wanted given the quantized inputs: Li et al. 2025, arXiv 2504.02692 (GPTAQ).

    >>> hessian = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    >>> weights = torch.tensor([[0.4, 0.4]])
    >>> error = OutputError(hessian, weights @ hessian, torch.ones(1))
    >>> gptq_codes(plan_walk(error), Grid(torch.ones(1, 1), torch.zeros(1, 1), 1, 2))
    tensor([[1, 0]], dtype=torch.uint8)
    """
    lower, wanted = walk.lower, walk.wanted.T.contiguous()
    columns, rows = wanted.shape
    scale, zero, top = _spread(grid, rows, columns, lower.dtype)
    scale, zero = scale[walk.order], zero[walk.order]
    step = torch.where(scale == 0, torch.inf, scale)
    error = torch.zeros_like(wanted)
    codes = torch.zeros_like(wanted)
    for stop in range(columns, 0, -BLOCK):
        start = max(stop - BLOCK, 0)
        target = wanted[start:stop] + lower[stop:, start:stop].T @ error[stop:]
        inner = lower[start:stop, start:stop]
        for i in reversed(range(stop - start)):
            j = start + i
            code = target[i].div(step[j]).add_(zero[j]).round_().clamp_(min=0)
            codes[j] = code = torch.minimum(code, top)
            error[j] = wanted[j] - (code - zero[j]) * scale[j]
            target[:i].addr_(inner[i, :i], error[j])
    out = torch.empty_like(codes, dtype=torch.uint8)
    out[walk.order] = codes.to(torch.uint8)
    return out.T.contiguous()


def _spread(
    grid: Grid, rows: int, columns: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scale and zero of every weight, (columns, rows), and the top code of every row."""

    def wide(part: Tensor) -> Tensor:
        return part.to(dtype).expand(rows, -1).T.repeat_interleave(grid.group_size, 0)[:columns]

    scale = wide(grid.scale)
    top = torch.as_tensor(grid.levels, device=scale.device).reshape(-1).expand(rows)
    if grid.zero is not None:
        return scale, wide(grid.zero), top.to(dtype)
    zero = torch.as_tensor(symmetric_zero(top)).to(dtype)
    return scale, zero.expand(columns, rows), top.to(dtype)


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
        best = _mixed(better, (codes, grid, found), best)
    if best is None:
        raise ValueError("best_of needs one candidate or more; got none.")
    return best


def _mixed(
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
        best = _mixed(after < best[2], (found, scaled, after), best)
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
    scale, _, top = _spread(grid, rows, columns, hessian.dtype)
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
