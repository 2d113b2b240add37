"""GPTQ: codes that keep a layer's output rather than its weights, one column after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.codes.grid import Coded, Grid, wide_grid
from clipquant.quant.error.output_error import BLOCK, OutputError

_AT_ONCE = 2048  # rows walked together, so that a column costs the same few calls for all of them


@dataclass(frozen=True)
class Walk:
    """H factored for one order of deciding columns: what every grid tried on a layer shares.

    Args:
        order: (columns,): the column decided last comes first.
        lower: Lower Cholesky factor of H in that order, each column divided by its diagonal. With `few`
            its blocks on the diagonal alone, beside each other: (columns, BLOCK).
        wanted: (rows, columns), in that order: the float weights of least output error.
        few: Two (samples, columns) tensors, R and P: below the block of column j the factor is
            `R[:, i] . P[:, j]`.
    """

    order: Tensor
    lower: Tensor
    wanted: Tensor
    few: tuple[Tensor, Tensor] | None = None

    @property
    def weights(self) -> Tensor:
        """The weights of least output error, (rows, columns) in the matrix's own order."""
        weights = torch.empty_like(self.wanted)
        weights[:, self.order] = self.wanted
        return weights

    def towards(self, weights: Tensor) -> Walk:
        """Return the walk whose codes are near other (rows, columns) weights."""
        return replace(self, wanted=weights[:, self.order])


def plan_walk(error: OutputError) -> Walk:
    """Return the walk in descending order of H's diagonal ("act-order").

    Args:
        error: Damped.

    Raises:
        ValueError: If H cannot be factored at all, as with NaN in it.
    """
    if error.inputs is not None:
        return _plan_few(error, error.inputs)
    order = error.hessian.diagonal().argsort(stable=True)
    hessian, damping = error.hessian[order][:, order], 0.0
    while True:
        lower, info = torch.linalg.cholesky_ex(hessian)
        if not info.any():
            break
        damping = max(10 * damping, 1e-4)
        if not damping < 1e4:
            raise ArgumentError(
                "the inputs' second moments cannot be factored: they hold NaN or infinity."
            )
        hessian.diagonal().add_(damping * error.hessian.diagonal().abs().mean())
    wanted = torch.cholesky_solve(error.goal[:, order].T, lower).T
    return Walk(order, lower.div_(lower.diagonal().clone()), wanted)


def _plan_few(error: OutputError, inputs: Tensor) -> Walk:
    """Return the walk of few samples, by factors of their number alone.

    With D the diagonal beside the inputs R, what is left of H when the columns before a block are
    eliminated is `D + R^T M R` of the rest, with `M^-1 = 1 + sum r r^T / d` over those columns
    (Woodbury). Nothing is subtracted, and no (columns, columns) matrix is formed.
    """
    diagonal = error.diagonal()
    order = diagonal.argsort(stable=True)
    r, d = inputs[:, order], torch.maximum(error.hessian[order], 1e-7 * diagonal.mean())
    columns = len(order)
    lower, spread = r.new_zeros(columns, BLOCK), torch.empty_like(r)
    gone = torch.eye(len(r), dtype=r.dtype, device=r.device)
    for start, stop in reversed(list(_blocks(columns))):
        own = r[:, start:stop]
        factor = _factor(gone)
        left = torch.cholesky_solve(own, factor)  # M R
        block = _factor((own.T @ left).add_(d[start:stop].diag()))
        below = torch.linalg.solve_triangular(block, left.T, upper=False).T
        unit = block.diagonal()
        spread[:, start:stop] = below / unit
        lower[start:stop, : stop - start] = block / unit
        gone.addmm_(own / d[start:stop], own.T)
    wanted = _solved_few(error.goal[:, order], r, d)
    return Walk(order, lower, wanted, (r, spread))


def _factor(matrix: Tensor) -> Tensor:
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info.any():
        raise ArgumentError(
            "the inputs' second moments cannot be factored: they hold NaN or infinity."
        )
    return lower


def _solved_few(goal: Tensor, r: Tensor, d: Tensor) -> Tensor:
    """Return `goal H^-1` by Woodbury's identity, in float64 since near numbers are subtracted."""
    wide = goal.double() / d
    some = r.double() / d.sqrt()
    inner = (some @ some.T).add_(torch.eye(len(r), dtype=some.dtype, device=r.device))
    off = torch.cholesky_solve((wide @ r.double().T).T, _factor(inner)).T
    wanted: Tensor = wide - (off @ r.double()) / d
    return wanted.to(goal.dtype)


def _blocks(columns: int) -> Sequence[tuple[int, int]]:
    """Return starts and ends of the blocks, in the order in which they are decided: from the end."""
    return [(max(stop - BLOCK, 0), stop) for stop in range(columns, 0, -BLOCK)]


def gptq_codes(walk: Walk, grid: Grid) -> Coded:
    """Return codes whose output error is low: each column makes up for those decided before it.

    GPTQ's update of the columns still open is Babai's nearest-plane walk along the Cholesky factor of
    H from its end, so H is factored once and never inverted.

    Args:
        walk: Order, factor and weights wanted.
        grid: The values allowed.

    Returns:
        Codes (rows, columns) on that grid.

    Source:
        Frantar et al. 2022, arXiv 2210.17323; Chen et al. 2025, arXiv 2507.18553 (Babai); weights
        wanted given the quantized inputs: Li et al. 2025, arXiv 2504.02692 (GPTAQ).

    >>> hessian = torch.tensor([[2.0, 1.9], [1.9, 2.0]])
    >>> weights = torch.tensor([[0.4, 0.4]])
    >>> error = OutputError(hessian, weights @ hessian, torch.ones(1))
    >>> gptq_codes(plan_walk(error), Grid(torch.ones(1, 1), torch.zeros(1, 1), 1, 2)).codes
    tensor([[1, 0]], dtype=torch.uint8)
    """
    wanted = walk.wanted.T.contiguous()
    columns, rows = wanted.shape
    scale, zero, top = wide_grid(grid, rows, columns, wanted.dtype)
    scale, zero = scale[walk.order], zero[walk.order]
    step = torch.where(scale == 0, torch.inf, scale)
    decided = _Decided(walk, wanted)
    codes = torch.zeros_like(wanted)
    for start, stop in _blocks(columns):
        target, inner = decided.targets(start, stop)
        for i in reversed(range(stop - start)):
            j = start + i
            code = target[i].div(step[j]).add_(zero[j]).round_().clamp_(min=0)
            codes[j] = code = torch.minimum(code, top)
            decided.error[j] = wanted[j] - (code - zero[j]) * scale[j]
            target[:i].addr_(inner[i, :i], decided.error[j])
        decided.close_(start, stop)
    out = torch.empty_like(codes, dtype=torch.uint8)
    out[walk.order] = codes.to(torch.uint8)
    return Coded(out.T.contiguous(), grid)


class _Decided:
    """The errors of the columns decided so far, and what they ask of those still open."""

    def __init__(self, walk: Walk, wanted: Tensor) -> None:
        self.walk, self.wanted = walk, wanted
        self.error = torch.zeros_like(wanted)
        self.seen = wanted.new_zeros(len(walk.few[0]), wanted.shape[1]) if walk.few else None

    def targets(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Return what the columns of a block should be, and the factor's square on the diagonal."""
        lower, own = self.walk.lower, self.wanted[start:stop]
        if self.walk.few is None or self.seen is None:
            asked = lower[stop:, start:stop].T @ self.error[stop:]
            return own + asked, lower[start:stop, start:stop]
        asked = self.walk.few[1][:, start:stop].T @ self.seen
        return own + asked, lower[start:stop, : stop - start]

    def close_(self, start: int, stop: int) -> None:
        """Take note that a block is decided."""
        if self.walk.few is not None and self.seen is not None:
            self.seen.addmm_(self.walk.few[0][:, start:stop], self.error[start:stop])


def walk_all(walk: Walk, grids: Sequence[Grid]) -> list[Coded]:
    """Return the codes on each of some grids, walked together where rows are not too many.

    Args:
        walk: Order, factor and weights wanted.
        grids: Of equal steps and group size.
    """
    rows = len(walk.wanted)
    size = max(_AT_ONCE // rows, 1)
    shared = any(grid.scale.shape[0] != rows for grid in grids)
    if size == 1 or shared:
        return [gptq_codes(walk, grid) for grid in grids]
    found: list[Coded] = []
    for first in range(0, len(grids), size):
        some = grids[first : first + size]
        wide = replace(walk, wanted=walk.wanted.repeat(len(some), 1))
        codes = gptq_codes(wide, Grid.stack(some)).codes.split(rows)
        found += [Coded(c, grid) for c, grid in zip(codes, some, strict=True)]
    return found
