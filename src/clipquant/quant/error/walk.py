"""GPTQ: codes that keep a layer's output rather than its weights, one column after the other."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.codes.grid import Coded, Grid, wide_grid
from clipquant.quant.error.output_error import BLOCK, OutputError


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
    lower, wanted = walk.lower, walk.wanted.T.contiguous()
    columns, rows = wanted.shape
    scale, zero, top = wide_grid(grid, rows, columns, lower.dtype)
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
    return Coded(out.T.contiguous(), grid)
