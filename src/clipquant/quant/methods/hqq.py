"""HQQ: each group's zero moved for a least 0.7-norm of the error, by half-quadratic splitting."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, dequantize_rows, group, quantize_rows
from clipquant.quant.codes.ranges import extremes, grid_between, mse_grid, narrow
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.base import Found, Method, Problem, by_weight


@dataclass(frozen=True)
class Hqq(Method):
    """Round to nearest on the min-max grid whose zeros are moved for a least sum of |error|**p.

    Args:
        p: Exponent of the error, below 1: few large errors count less than many small ones.
        beta: First weight of the quadratic term.
        kappa: Its growth at each step.
        steps: Most steps.

    Source:
        Badri and Shaji 2023, "Half-Quadratic Quantization".
    """

    p: float = 0.7
    beta: float = 10.0
    kappa: float = 1.01
    steps: int = 20
    name: ClassVar[str] = "hqq"
    needs_data: ClassVar[bool] = False
    summary: ClassVar[str] = "half-quadratic splitting, a 0.7-norm of the error"

    def solve(self, problem: Problem) -> Found:
        return by_weight(lambda w, spec: Coded.nearest(w, hqq_grid(w, spec, self)))(problem)


def hqq_grid(matrix: Tensor, spec: QuantSpec, knobs: Hqq | None = None) -> Grid:
    """Return the min-max grid with each group's zero moved for a least sum of |error|**0.7.

    Half-quadratic steps: the rounding error is shrunk towards sparsity, and the zero that explains the
    rest is a group's mean. Symmetric grids have no zero to move and get `mse_grid`.

    Args:
        matrix: Floating (rows, columns).
        spec: Steps, symmetry and granularity.
        knobs: How the steps are taken.

    Source:
        Badri and Shaji 2023, "Half-Quadratic Quantization": p = 0.7, beta = 10, kappa = 1.01, 20 steps.

    >>> hqq_grid(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), QuantSpec(bits=2)).scale
    tensor([[1.]])
    """
    if spec.symmetric:
        return mse_grid(matrix, spec)
    low, high = extremes(matrix, spec)
    grid = grid_between(low, high, spec, matrix.shape[1])
    knobs = knobs or Hqq()
    beta, best = knobs.beta, torch.inf
    kept = grid
    for _ in range(knobs.steps):
        zero, error = _half_quadratic_step(matrix, grid, beta, knobs.p, spec)
        if error >= best:
            break
        best, kept = error, grid
        grid = replace(grid, zero=torch.where(low == high, -1.0, zero))
        beta *= knobs.kappa
    return narrow(kept, low == high)


def _half_quadratic_step(
    matrix: Tensor, grid: Grid, beta: float, p: float, spec: QuantSpec
) -> tuple[Tensor, float]:
    """Return the next zeros, and the mean |error| of the grid as it is."""
    codes = quantize_rows(matrix, grid)
    error = matrix - dequantize_rows(codes, grid)
    size = error.abs()
    shrunk = error.sign() * (size - size.clamp(min=1e-8).pow(p - 1) / beta).clamp(min=0)
    groups = (group(part, grid.group_size) for part in (codes.double(), (matrix - shrunk).double()))
    q, w = groups
    step = torch.where(grid.scale == 0, torch.inf, grid.scale)
    zeros = q - w / step.unsqueeze(-1)
    zero = zeros.mean().reshape(1, 1) if spec.granularity == "tensor" else zeros.mean(2)
    return zero, float(size.mean())
