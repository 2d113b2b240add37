"""One weight's codes by GPTQ at every width at once, its rows walked together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows, group, quantize_rows
from clipquant.quant.codes.ranges import extremes, grid_between, narrow, recentre
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.descent import descend, refine
from clipquant.quant.error.output_error import OutputError
from clipquant.quant.error.walk import Walk, gptq_codes, plan_walk
from clipquant.quant.methods.gptq import DAMPING
from clipquant.quant.network.moments import Moments
from clipquant.quant.widths.frontier import WIDTHS
from clipquant.quant.widths.table import RowTable, join_rows, stack_grids

SWEEPS = 5
_ENOUGH = 3e-3  # a sweep that gains less than this share of the error is the last
_VALUES = 1 << 24  # worked on at once, as many weights at as many widths
# How far the ends of a min-max range are drawn in for GPTQ to try: the fewer codes, the further.
_DRAWN_IN = {
    1: (0.8, 0.65, 0.5, 0.4, 0.3),
    2: (1.0, 0.85, 0.7, 0.55, 0.4),
    3: (1.0, 0.9, 0.8, 0.7, 0.6),
    4: (1.0, 0.95, 0.9, 0.85, 0.8),
}
_FINE = (1.0, 0.93)


def solve_rows(
    matrix: Tensor, moments: Moments, widths: Sequence[int], group_size: int, *, centred: bool
) -> RowTable:
    """Return a weight's codes by GPTQ at several widths; no row is worse than rounded to nearest.

    All rows and widths are walked together, since H does not depend on them. A row's error is
    (w - q) H (w - q)^T, with H of the float network's inputs, damped: the few inputs seen say little
    of the directions that they leave out. Whether a row is worse is judged without the damping.

    Args:
        matrix: Floating (rows, columns).
        moments: Of its inputs in the float network, H in full.
        widths: Of 0 to 8 bits; 0 gives each row's best constant.
        group_size: Neighbouring columns that share a scale.
        centred: Leave the mean error out, since a bias will take it up.

    Source:
        Frantar et al. 2022, arXiv 2210.17323 (GPTQ); Behdin et al. 2023, arXiv 2309.01885 (descent).
    """
    parts = matrix.float().chunk(moments.hessian.shape[0])
    dtype = _scale_dtype(matrix.float(), widths, group_size)
    tables = []
    for g, part in enumerate(parts):
        hessian, mean = moments.hessian[g], moments.mean[g]
        if centred:
            hessian = hessian - torch.outer(mean, mean)
        problem = _Problem.of(part, hessian, group_size, dtype)
        tables.append(_solve_part(problem, widths, mean if centred else None))
    return join_rows(tables)


def _scale_dtype(matrix: Tensor, widths: Sequence[int], group_size: int) -> torch.dtype:
    """Return the smallest dtype in which no min-max grid of these widths moves; see `narrow`."""
    found = torch.float16
    for width in widths:
        grid, constant = _drawn_in(matrix, max(width, 1), 1.0, group_size)
        found = torch.promote_types(found, narrow(grid, constant).scale.dtype)
    return found


def _drawn_in(matrix: Tensor, width: int, factor: float, group_size: int) -> tuple[Grid, Tensor]:
    """Return the min-max grid in float64 with its ends drawn in, and which groups are constant."""
    spec = QuantSpec(width, symmetric=False, granularity=group_size)
    low, high = extremes(matrix, spec)
    constant = low == high
    first, last = (torch.where(constant, end, end * factor) for end in (low, high))
    return grid_between(first, last, spec, matrix.shape[1]), constant


@dataclass(frozen=True)
class _Problem:
    """Rows that share their inputs: weights, H, H damped and factored."""

    matrix: Tensor
    hessian: Tensor
    damped: Tensor
    walk: Walk
    group_size: int
    dtype: torch.dtype

    @classmethod
    def of(cls, matrix: Tensor, hessian: Tensor, group_size: int, dtype: torch.dtype) -> _Problem:
        nothing = OutputError(hessian, hessian.new_zeros(1, len(hessian)), hessian.new_zeros(1))
        damped = nothing.damped(matrix[:1] * 0, DAMPING)
        return cls(matrix, hessian, damped.hessian, plan_walk(damped), group_size, dtype)

    def rows(self, start: int, stop: int) -> _Problem:
        return replace(self, matrix=self.matrix[start:stop])

    def grid(self, widths: Sequence[int], trial: int | None = None) -> Grid:
        """Return the grid of all rows at all widths, width after width: min-max, or a trial's range."""
        grids = []
        for width in widths:
            factor = 1.0 if trial is None else _DRAWN_IN.get(width, _FINE)[trial]
            grid, constant = _drawn_in(self.matrix, width, factor, self.group_size)
            grids.append(recentre(grid, self.dtype, constant))
        return stack_grids(grids)


@dataclass(frozen=True)
class _Rows:
    """Codes of rows, with H (q - w) and the error (q - w) H (q - w)^T, H damped."""

    codes: Tensor
    grid: Grid
    slope: Tensor
    error: Tensor

    def better(self, other: _Rows) -> _Rows:
        """Return for each row the one of less error."""
        worse = ~(other.error < self.error)
        rows = worse[:, None]
        return _Rows(
            torch.where(rows, self.codes, other.codes),
            _mixed_grid(rows, self.grid, other.grid),
            torch.where(rows, self.slope, other.slope),
            torch.where(worse, self.error, other.error),
        )


def _solve_part(problem: _Problem, widths: Sequence[int], mean: Tensor | None) -> RowTable:
    rows, columns = problem.matrix.shape
    coarse = [width for width in widths if width in _DRAWN_IN]
    fine = [width for width in widths if width > max(_DRAWN_IN)]
    at_once = max(_VALUES // (columns * max(len(coarse), len(fine), 1)), 1)
    chunks = []
    for start in range(0, rows, at_once):
        part = problem.rows(start, min(start + at_once, rows))
        found = {w: r for some in (coarse, fine) if some for w, r in _by_width(part, some)}
        if 0 in widths:
            found[0] = _constants(part)
        chunks.append(_table(part, found, mean))
    return join_rows(chunks)


def _by_width(problem: _Problem, widths: Sequence[int]) -> Iterator[tuple[int, _Rows]]:
    """Yield each width with its rows, solved together: widths with equally many ranges to try."""
    count = len(problem.matrix)
    wide = problem.matrix.repeat(len(widths), 1)
    best: _Rows | None = None
    for trial in range(len(_DRAWN_IN.get(widths[0], _FINE))):
        grid = problem.grid(widths, trial)
        walk = replace(problem.walk, wanted=wide[:, problem.walk.order])
        found = _judged(wide, gptq_codes(walk, grid), grid, problem.damped)
        best = found if best is None else best.better(found)
    assert best is not None  # noqa: S101 - there are trials
    solved = _refined(wide, best, problem)
    plain = problem.grid(widths)
    rounded = _judged(wide, quantize_rows(wide, plain), plain, problem.hessian)
    last = rounded.better(_weighted(wide, solved, problem, -1.0))
    last = _weighted(wide, last, problem, 1.0)
    for i, width in enumerate(widths):
        own = slice(i * count, (i + 1) * count)
        grid = replace(_cut(last.grid, own), levels=2**width - 1)
        yield width, _Rows(last.codes[own], grid, last.slope[own], last.error[own])


def _judged(wide: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> _Rows:
    off = dequantize_rows(codes, grid).float().sub_(wide)
    slope = off @ hessian
    return _Rows(codes, grid, slope, (off * slope).sum(1, dtype=torch.float64))


def _weighted(wide: Tensor, found: _Rows, problem: _Problem, sign: float) -> _Rows:
    """Return the same rows with the damping's share of slope and error added (1) or taken off (-1)."""
    off = dequantize_rows(found.codes, found.grid).float().sub_(wide)
    pull = problem.damped.diagonal() - problem.hessian.diagonal()
    slope = torch.addcmul(found.slope, off, pull, value=sign)
    return replace(found, slope=slope, error=(off * slope).sum(1, dtype=torch.float64))


def _constants(problem: _Problem) -> _Rows:
    """Return the constant of least error for each row, or for each of its groups its mean."""
    matrix = problem.matrix
    if problem.group_size < matrix.shape[1]:
        grouped = group(matrix, problem.group_size)
        middle, first = grouped.mean(2), grouped[:, :, 0]
        middle = torch.where((grouped == grouped[:, :, :1]).all(2), first, middle)
    else:
        total = problem.damped.sum(1).double()
        middle = (matrix.double() @ total / total.sum()).unsqueeze(1)
        middle = torch.where((matrix == matrix[:, :1]).all(1, True), matrix[:, :1], middle)
    scale = middle.to(problem.dtype)
    grid = Grid(scale, torch.full_like(scale, -1.0), 0, problem.group_size)
    return _judged(matrix, torch.zeros_like(matrix, dtype=torch.uint8), grid, problem.damped)


def _refined(wide: Tensor, found: _Rows, problem: _Problem) -> _Rows:
    """Return rows of no greater error: each column at its best code, then each row at its best scale."""
    if problem.group_size < wide.shape[1]:
        goal = wide @ problem.damped
        error = OutputError(problem.damped, goal, (goal * wide).sum(1))
        codes, grid = refine(error, found.codes, found.grid, SWEEPS)
        return _judged(wide, codes, grid, problem.damped)
    goal = (problem.matrix @ problem.damped).repeat(len(wide) // len(problem.matrix), 1)
    for _ in range(SWEEPS):
        codes, slope = descend(problem.damped, found.slope, found.codes, found.grid)
        off = dequantize_rows(codes, found.grid).float().sub_(wide)
        moved = _Rows(codes, found.grid, slope, (off * slope).sum(1, dtype=torch.float64))
        before, found = found.error.sum(), found.better(_rescaled(moved, goal, problem.damped))
        if before - found.error.sum() <= _ENOUGH * before:
            break
    return found


def _rescaled(rows: _Rows, goal: Tensor, hessian: Tensor) -> _Rows:
    """Return the rows with the scale and zero of least error for their codes, rounded to their dtype.

    With v = a q - b and u = H 1, H q follows from the slope H (v - w) = H v - goal, so that no product
    with H is needed.
    """
    a, zero = rows.grid.scale.float(), rows.grid.zero
    assert zero is not None  # noqa: S101 - an affine grid
    b = a * zero.float()
    u = hessian.sum(1)
    q = rows.codes.float()
    hq = (rows.slope + goal).add_(b * u).div_(torch.where(a > 0, a, 1.0))
    qq, q1 = ((q * part).sum(1, True, dtype=torch.float64) for part in (hq, u))
    qs, s1 = (part.sum(1, True, dtype=torch.float64) for part in (q * rows.slope, rows.slope))
    one = u.sum(dtype=torch.float64)
    by = (q1 * s1 / one - qs) / (qq - q1.square() / one)  # what is added to a
    scale = (a + by).to(rows.grid.scale.dtype)
    offset = b + (s1 + by * q1) / one
    moved = (offset / scale.double()).to(scale.dtype)
    by = scale.double() - a
    down = scale.double() * moved.double() - b
    gain = by.square() * qq - 2 * by * down * q1 + down.square() * one + 2 * (by * qs - down * s1)
    good = (gain < 0) & (a > 0) & (scale > 0) & torch.isfinite(moved) & torch.isfinite(gain)
    by, down = (torch.where(good, part, 0.0).float() for part in (by, down))
    grid = replace(
        rows.grid,
        scale=torch.where(good, scale, rows.grid.scale),
        zero=torch.where(good, moved, zero),
    )
    slope = hq.mul_(by).sub_(down * u).add_(rows.slope)
    return _Rows(rows.codes, grid, slope, rows.error + torch.where(good, gain, 0.0).squeeze(1))


def _table(problem: _Problem, found: Mapping[int, _Rows], mean: Tensor | None) -> RowTable:
    errors = torch.full((len(problem.matrix), WIDTHS), torch.inf, dtype=torch.float64)
    shifts = {}
    for width, rows in found.items():
        errors[:, width] = rows.error.clamp(min=0)
        if mean is not None:
            shifts[width] = (problem.matrix - dequantize_rows(rows.codes, rows.grid)) @ mean
    codes = {width: rows.codes for width, rows in found.items()}
    grids = {width: rows.grid for width, rows in found.items()}
    return RowTable(codes, grids, errors, shifts, "gptq")


def _cut(grid: Grid, rows: slice) -> Grid:
    zero = None if grid.zero is None else grid.zero[rows]
    return replace(grid, scale=grid.scale[rows], zero=zero)


def _mixed_grid(first: Tensor, one: Grid, other: Grid) -> Grid:
    zero = one.zero
    if one.zero is not None and other.zero is not None:
        zero = torch.where(first, one.zero, other.zero)
    return replace(one, scale=torch.where(first, one.scale, other.scale), zero=zero)
