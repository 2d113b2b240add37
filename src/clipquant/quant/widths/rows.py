"""One weight's codes by GPTQ at every width at once, its rows walked together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, group
from clipquant.quant.codes.ranges import extremes, grid_between, narrow, recentre
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.descent import descend, refine
from clipquant.quant.error.output_error import DAMPING, OutputError, varying
from clipquant.quant.error.walk import Walk, gptq_codes, plan_walk
from clipquant.quant.network.moments import Moments
from clipquant.quant.widths.frontier import WIDTHS
from clipquant.quant.widths.table import RowTable

_ENOUGH = 3e-3  # a sweep that gains less than this share of the error is the last


@dataclass(frozen=True)
class RowGptq:
    """How rows are walked.

    Args:
        drawn_in: Width -> shares of the min-max range that are tried: the fewer codes, the smaller.
        fine: The shares tried at all wider codes.
        sweeps: Most rounds of descent after the walk.
        at_once: Values worked on at once, as many weights at as many widths.
        damping: Pull towards the float weights, as a share of H's mean diagonal.
    """

    drawn_in: Mapping[int, tuple[float, ...]] = field(
        default_factory=lambda: {
            1: (0.8, 0.65, 0.5, 0.4, 0.3),
            2: (1.0, 0.85, 0.7, 0.55, 0.4),
            3: (1.0, 0.9, 0.8, 0.7, 0.6),
            4: (1.0, 0.95, 0.9, 0.85, 0.8),
        }
    )
    fine: tuple[float, ...] = (1.0, 0.93)
    sweeps: int = 5
    at_once: int = 1 << 24
    damping: float = DAMPING

    def shares(self, width: int) -> tuple[float, ...]:
        """Return the shares of the range that are tried at a width."""
        return self.drawn_in.get(width, self.fine)


def solve_rows(
    matrix: Tensor,
    moments: Moments,
    widths: Sequence[int],
    group_size: int,
    *,
    centred: bool,
    knobs: RowGptq | None = None,
) -> RowTable:
    """Return a weight's codes by GPTQ at several widths; no row is worse than rounded to nearest.

    All rows and widths are walked together, since H does not depend on them. A row's error is
    (w - q) H (w - q)^T, with H of the float network's inputs. The few inputs seen say little of the
    directions that they leave out: what of H off its diagonal is chance, by how it differs from piece to
    piece of the data and by columns against samples, is taken off, and H is damped. Whether a row is worse
    is judged without either.

    Args:
        matrix: Floating (rows, columns).
        moments: Of its inputs in the float network, H in full.
        widths: Of 0 to 8 bits; 0 gives each row's best constant.
        group_size: Neighbouring columns that share a scale.
        centred: Leave the mean error out, since a bias will take it up.
        knobs: How the rows are walked.

    Source:
        Frantar et al. 2022, arXiv 2210.17323 (GPTQ); Behdin et al. 2023, arXiv 2309.01885 (descent).
    """
    parts = matrix.float().chunk(moments.hessian.shape[0])
    dtype = _scale_dtype(matrix.float(), widths, group_size)
    tables = []
    for g, part in enumerate(parts):
        hessian = row_hessian(moments, g, centred)
        problem = _Problem.of(
            part, hessian, believed_hessian(hessian, moments), group_size, dtype, knobs or RowGptq()
        )
        tables.append(_solve_part(problem, widths, moments.mean[g] if centred else None))
    return RowTable.stack(tables)


def row_hessian(moments: Moments, part: int, centred: bool) -> Tensor:
    """Return H of one part of a weight's rows, (columns, columns), the mean error left out where `centred`."""
    hessian, mean = moments.hessian[part], moments.mean[part]
    if not centred:
        return hessian
    moving = varying(hessian, mean)
    return (hessian - torch.outer(mean, mean)) * torch.outer(moving, moving)


def damped_error(hessian: Tensor, damping: float = DAMPING) -> OutputError:
    """Return the error of H with its pull towards the float weights, of which none is given."""
    nothing = OutputError(hessian, hessian.new_zeros(1, len(hessian)), hessian.new_zeros(1))
    return nothing.damped(torch.zeros_like(hessian[:1]), damping)


def believed_hessian(hessian: Tensor, moments: Moments) -> Tensor:
    """Return H without the share off its diagonal that is chance, as `Gptq` takes it."""
    columns = len(hessian)
    chance = max(moments.noise, columns / (columns + moments.count))
    kept = hessian * (1 - chance)
    kept.diagonal().copy_(hessian.diagonal())
    return kept


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
    """Rows that share their inputs: weights, H as shown, H as believed, the same damped and factored."""

    matrix: Tensor
    shown: Tensor
    hessian: Tensor
    damped: Tensor
    walk: Walk
    group_size: int
    dtype: torch.dtype
    knobs: RowGptq

    @classmethod
    def of(
        cls,
        matrix: Tensor,
        shown: Tensor,
        hessian: Tensor,
        group_size: int,
        dtype: torch.dtype,
        knobs: RowGptq,
    ) -> _Problem:
        damped = damped_error(hessian, knobs.damping)
        walk = plan_walk(damped)
        return cls(matrix, shown, hessian, damped.hessian, walk, group_size, dtype, knobs)

    def rows(self, start: int, stop: int) -> _Problem:
        return replace(self, matrix=self.matrix[start:stop])

    def grid(self, widths: Sequence[int], trial: int | None = None) -> Grid:
        """Return the grid of all rows at all widths, width after width: min-max, or a trial's range."""
        grids = []
        for width in widths:
            factor = 1.0 if trial is None else self.knobs.shares(width)[trial]
            grid, constant = _drawn_in(self.matrix, width, factor, self.group_size)
            grids.append(recentre(grid, self.dtype, constant))
        return Grid.stack(grids)


@dataclass(frozen=True)
class _Rows:
    """Codes of rows, with H (q - w) and the error (q - w) H (q - w)^T, H damped."""

    coded: Coded
    slope: Tensor
    error: Tensor

    def better(self, other: _Rows) -> _Rows:
        """Return for each row the one of less error."""
        return self.where(~(other.error < self.error), other)

    def where(self, own: Tensor, other: _Rows) -> _Rows:
        """Return these rows where `own`, (rows,), is true, and the other ones elsewhere."""
        return _Rows(
            self.coded.where(own, other.coded),
            torch.where(own[:, None], self.slope, other.slope),
            torch.where(own, self.error, other.error),
        )

    def rows(self, start: int, stop: int) -> _Rows:
        return _Rows(self.coded.rows(start, stop), self.slope[start:stop], self.error[start:stop])


def _solve_part(problem: _Problem, widths: Sequence[int], mean: Tensor | None) -> RowTable:
    rows, columns = problem.matrix.shape
    knobs = problem.knobs
    coarse = [width for width in widths if width in knobs.drawn_in]
    fine = [width for width in widths if width > max(knobs.drawn_in)]
    at_once = max(knobs.at_once // (columns * max(len(coarse), len(fine), 1)), 1)
    chunks = []
    for start in range(0, rows, at_once):
        part = problem.rows(start, min(start + at_once, rows))
        found = {w: r for some in (coarse, fine) if some for w, r in _by_width(part, some)}
        if 0 in widths:
            found[0] = _constants(part)
        chunks.append(_table(part, found, mean))
    return RowTable.stack(chunks)


def _by_width(problem: _Problem, widths: Sequence[int]) -> Iterator[tuple[int, _Rows]]:
    """Yield each width with its rows, solved together: widths with equally many ranges to try."""
    count = len(problem.matrix)
    wide = problem.matrix.repeat(len(widths), 1)
    best: _Rows | None = None
    for trial in range(len(problem.knobs.shares(widths[0]))):
        grid = problem.grid(widths, trial)
        walk = replace(problem.walk, wanted=wide[:, problem.walk.order])
        found = _judged(wide, gptq_codes(walk, grid), problem.damped)
        best = found if best is None else best.better(found)
    assert best is not None  # noqa: S101 - there are trials
    solved = _refined(wide, best, problem)
    plain = problem.grid(widths)
    rounded = _judged(wide, Coded.nearest(wide, plain), problem.damped)
    shown = (_errors_of(wide, rows.coded, problem.shown) for rows in (solved, rounded))
    last = rounded.where(next(shown) > next(shown), solved)
    for i, width in enumerate(widths):
        own = last.rows(i * count, (i + 1) * count)
        grid = replace(own.coded.grid, levels=2**width - 1)
        yield width, replace(own, coded=replace(own.coded, grid=grid))


def _judged(wide: Tensor, coded: Coded, hessian: Tensor) -> _Rows:
    off = coded.values().float().sub_(wide)
    slope = off @ hessian
    return _Rows(coded, slope, (off * slope).sum(1, dtype=torch.float64))


def _errors_of(wide: Tensor, coded: Coded, hessian: Tensor) -> Tensor:
    off = coded.values().float().sub_(wide)
    return (off @ hessian).mul_(off).sum(1, dtype=torch.float64)


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
    zeros = torch.zeros_like(matrix, dtype=torch.uint8)
    return _judged(matrix, Coded(zeros, grid), problem.damped)


def _refined(wide: Tensor, found: _Rows, problem: _Problem) -> _Rows:
    """Return rows of no greater error: each column at its best code, then each row at its best scale."""
    if problem.group_size < wide.shape[1]:
        goal = wide @ problem.damped
        error = OutputError(problem.damped, goal, (goal * wide).sum(1))
        return _judged(wide, refine(error, found.coded, problem.knobs.sweeps), problem.damped)
    goal = (problem.matrix @ problem.damped).repeat(len(wide) // len(problem.matrix), 1)
    for _ in range(problem.knobs.sweeps):
        coded, slope = descend(problem.damped, found.slope, found.coded)
        off = coded.values().float().sub_(wide)
        moved = _Rows(coded, slope, (off * slope).sum(1, dtype=torch.float64))
        before, found = found.error.sum(), found.better(_rescaled(moved, goal, problem.damped))
        if before - found.error.sum() <= _ENOUGH * before:
            break
    return found


def _rescaled(rows: _Rows, goal: Tensor, hessian: Tensor) -> _Rows:
    """Return the rows with the scale and zero of least error for their codes, rounded to their dtype.

    With v = a q - b and u = H 1, H q follows from the slope H (v - w) = H v - goal, so that no product
    with H is needed.
    """
    old = rows.coded.grid
    a, zero = old.scale.float(), old.zero
    assert zero is not None  # noqa: S101 - an affine grid
    b = a * zero.float()
    u = hessian.sum(1)
    q = rows.coded.codes.float()
    hq = (rows.slope + goal).add_(b * u).div_(torch.where(a > 0, a, 1.0))
    qq, q1 = ((q * part).sum(1, True, dtype=torch.float64) for part in (hq, u))
    qs, s1 = (part.sum(1, True, dtype=torch.float64) for part in (q * rows.slope, rows.slope))
    one = u.sum(dtype=torch.float64)
    by = (q1 * s1 / one - qs) / (qq - q1.square() / one)  # what is added to a
    scale = (a + by).to(old.scale.dtype)
    offset = b + (s1 + by * q1) / one
    moved = (offset / scale.double()).to(scale.dtype)
    by = scale.double() - a
    down = scale.double() * moved.double() - b
    gain = by.square() * qq - 2 * by * down * q1 + down.square() * one + 2 * (by * qs - down * s1)
    good = (gain < 0) & (a > 0) & (scale > 0) & torch.isfinite(moved) & torch.isfinite(gain)
    by, down = (torch.where(good, part, 0.0).float() for part in (by, down))
    grid = replace(
        old, scale=torch.where(good, scale, old.scale), zero=torch.where(good, moved, zero)
    )
    slope = hq.mul_(by).sub_(down * u).add_(rows.slope)
    error = rows.error + torch.where(good, gain, 0.0).squeeze(1)
    return _Rows(Coded(rows.coded.codes, grid), slope, error)


def _table(problem: _Problem, found: Mapping[int, _Rows], mean: Tensor | None) -> RowTable:
    errors = torch.full((len(problem.matrix), WIDTHS), torch.inf, dtype=torch.float64)
    shifts = {}
    for width, rows in found.items():
        errors[:, width] = rows.error.clamp(min=0)
        if mean is not None:
            shifts[width] = (problem.matrix - rows.coded.values()) @ mean
    return RowTable({width: rows.coded for width, rows in found.items()}, errors, shifts, "gptq")
