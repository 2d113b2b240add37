"""One weight's codes by any method, from the matrix and what is known of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows, quantize_rows
from clipquant.quant.codes.ranges import (
    hqq_grid,
    mse_grid,
    plain_rounding,
    shrunk_grid,
)
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.descent import refine
from clipquant.quant.error.output_error import OutputError, best_of
from clipquant.quant.error.walk import Walk, gptq_codes, plan_walk
from clipquant.quant.network.moments import Moments

DAMPING = 0.01

# How far the ends of a min-max range are drawn in for GPTQ to try: the fewer codes, the further.
_DRAWN_IN = {
    1: (0.9, 0.7, 0.6, 0.5, 0.4, 0.3),
    2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
    3: (1.0, 0.9, 0.8, 0.7, 0.6),
}
_FINE = (1.0, 0.95, 0.9, 0.8)


@dataclass(frozen=True)
class Solution:
    """Codes and grid of a weight, and what they do to the layer's output.

    Args:
        codes: uint8 (rows, columns).
        grid: Their grid.
        method: What chose them: "rtn" where nothing did better.
        error: Squared output error as a share of the output's mean square; of the weights where
            nothing is known of the inputs.
        rtn_error: The same for plain rounding.
    """

    codes: Tensor
    grid: Grid
    method: str
    error: float
    rtn_error: float


def solve_free(matrix: Tensor, spec: QuantSpec, method: str) -> Solution:
    """Return a weight's codes by a method that needs no data: "rtn", "mse" or "hqq".

    >>> solve_free(torch.tensor([[0.0, 1.0, 2.2, 3.0]]), QuantSpec(bits=2), "rtn").codes
    tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    """
    rtn = plain_rounding(matrix, spec)
    codes, grid = rtn
    if method != "rtn":
        grid = (mse_grid if method == "mse" else hqq_grid)(matrix, spec)
        codes = quantize_rows(matrix, grid)
    energy = float(matrix.double().square().sum()) or 1.0
    error, plain = (_weight_error(matrix, *c) / energy for c in ((codes, grid), rtn))
    return Solution(codes, grid, method, error, plain)


def _weight_error(matrix: Tensor, codes: Tensor, grid: Grid) -> float:
    return float((dequantize_rows(codes, grid) - matrix).square().sum(dtype=torch.float64))


def solve(
    matrix: Tensor,
    spec: QuantSpec,
    moments: Moments,
    *,
    centred: bool,
    start: tuple[Tensor, Grid] | None = None,
) -> Solution:
    """Return a weight's codes by GPTQ, on the range that serves the output best; never worse than RTN.

    Args:
        matrix: Floating (rows, columns).
        spec: The grid asked for.
        moments: What is known of the inputs.
        centred: Leave the mean error out, since a bias will take it up.
        start: Codes and grid found before, as another candidate.
    """
    groups = moments.hessian.shape[0]
    if moments.hessian.dim() == 2:
        return _solve_diagonal(matrix, spec, moments)
    if spec.granularity == "tensor" and groups > 1:
        return solve_free(matrix, spec, "mse")
    parts = matrix.float().chunk(groups)
    starts = [None] * groups if start is None else _split(*start, groups)
    solved = [
        _solve_group(part, spec, output_error_of(moments, g, centred), starts[g])
        for g, part in enumerate(parts)
    ]
    return _joined(solved)


def _solve_diagonal(matrix: Tensor, spec: QuantSpec, moments: Moments) -> Solution:
    """Return nearest codes on the range of least error, each weight counted by its input's E[x^2]."""
    rows = matrix.shape[0] // moments.hessian.shape[0]
    weight = moments.hessian.repeat_interleave(rows, 0)
    grid = mse_grid(matrix.float(), spec, weight)
    found, rtn = (quantize_rows(matrix, grid), grid), plain_rounding(matrix, spec)
    energy = float((matrix.square() * weight).sum()) or 1.0
    errors = [
        float(((dequantize_rows(*c) - matrix).square() * weight).sum()) / energy
        for c in (found, rtn)
    ]
    if errors[0] > errors[1]:
        return Solution(*rtn, "rtn", errors[1], errors[1])
    return Solution(*found, "mse", errors[0], errors[1])


def output_error_of(moments: Moments, group: int, centred: bool) -> OutputError:
    """Return the output error of a group of rows, its mean left out if a bias takes that up."""
    hessian, goal, energy = moments.hessian[group], moments.goal[group], moments.energy[group]
    if not centred:
        return OutputError(hessian, goal, energy)
    mean, output = moments.mean[group], moments.output[group]
    return OutputError(
        hessian - torch.outer(mean, mean),
        goal - torch.outer(output, mean),
        energy - output.square(),
    )


@dataclass(frozen=True)
class _Part:
    codes: Tensor
    grid: Grid
    plain: bool
    errors: tuple[float, float, float]  # found, RTN, energy


def _solve_group(
    matrix: Tensor, spec: QuantSpec, error: OutputError, start: tuple[Tensor, Grid] | None
) -> _Part:
    damped = error.damped(matrix, DAMPING)
    walk = plan_walk(damped)
    codes, grid, _ = best_of(damped, _walks(matrix, spec, walk, error.hessian.diagonal(), start))
    found = refine(damped, codes, grid)
    rtn = plain_rounding(matrix, spec)
    plain = error.of_codes(*rtn)
    codes, grid, errors = best_of(error, [rtn, found])
    same = bool((errors >= plain).all())
    return _Part(
        codes, grid, same, (float(errors.sum()), float(plain.sum()), float(error.energy.sum()))
    )


def _walks(
    matrix: Tensor,
    spec: QuantSpec,
    walk: Walk,
    weight: Tensor,
    start: tuple[Tensor, Grid] | None,
) -> Iterator[tuple[Tensor, Grid]]:
    grids = [shrunk_grid(matrix, spec, f) for f in _DRAWN_IN.get(spec.width, _FINE)]
    if isinstance(spec.granularity, int):
        grids.append(mse_grid(matrix, spec, weight))
    if start is not None:
        yield start
        grids.append(start[1])
    for grid in grids:
        yield gptq_codes(walk, grid), grid


def _split(codes: Tensor, grid: Grid, groups: int) -> list[tuple[Tensor, Grid]]:
    zeros = [None] * groups if grid.zero is None else grid.zero.chunk(groups)
    parts = zip(codes.chunk(groups), grid.scale.chunk(groups), zeros, strict=True)
    return [(c, replace(grid, scale=s, zero=z)) for c, s, z in parts]


def _joined(parts: list[_Part]) -> Solution:
    """Return the solutions of groups of rows as one, with the widest of their scale dtypes."""
    first = parts[0].grid
    dtype = first.scale.dtype
    for part in parts[1:]:
        dtype = torch.promote_types(dtype, part.grid.scale.dtype)
    grids = [part.grid.to(dtype) for part in parts]
    zero = None if first.zero is None else torch.cat([g.zero for g in grids if g.zero is not None])
    found, plain, energy = (sum(part.errors[i] for part in parts) for i in range(3))
    return Solution(
        torch.cat([part.codes for part in parts]),
        replace(first, scale=torch.cat([g.scale for g in grids]), zero=zero),
        "rtn" if all(part.plain for part in parts) else "gptq",
        max(found, 0.0) / (energy or 1.0),
        max(plain, 0.0) / (energy or 1.0),
    )
