"""Weights that were pruned to zero: a grid with an exact zero, and codes that keep them there."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, quantize_rows, symmetric_zero
from clipquant.quant.codes.spec import QuantSpec

PRUNED = 0.05  # share of exact zeros from which a weight counts as pruned


def is_pruned(weight: Tensor) -> bool:
    """Return whether a weight holds many exact zeros beside other values.

    >>> is_pruned(torch.tensor([0.0, 0.0, 1.0])), is_pruned(torch.zeros(3))
    (True, False)
    """
    zeros = int((weight == 0).sum())
    return PRUNED * weight.numel() <= zeros < weight.numel() and zeros > 0


def with_zero(spec: QuantSpec) -> QuantSpec:
    """Return a grid like the one asked for with an exact zero, where it has steps enough for one.

    >>> with_zero(QuantSpec(bits=4)).symmetric
    True
    """
    least = spec.levels if spec.levels is not None else (1 << spec.bits) - 2
    return spec if least < 2 else replace(spec, symmetric=True)


def kept_zeros(coded: Coded, matrix: Tensor) -> Coded:
    """Return codes under which every exact zero of a matrix stays one.

    On a symmetric grid the zeros get its code of zero. On any other the grid's zeros become whole codes,
    and the weights of rows that would lose one the nearest values of the grid so moved; a row of no bits becomes
    zero.

    Args:
        coded: The codes chosen, on their grid.
        matrix: The float (rows, columns).

    >>> matrix = torch.tensor([[0.0, -0.25, 0.0, 1.2]])
    >>> from clipquant.quant.codes.ranges import plain_rounding
    >>> kept_zeros(plain_rounding(matrix, QuantSpec(2)), matrix).values()[0, [0, 2]]
    tensor([0., 0.])
    """
    grid, zeros = coded.grid, matrix == 0
    if grid.zero is None:
        middle = torch.as_tensor(
            symmetric_zero(grid.levels), dtype=torch.uint8, device=grid.scale.device
        )
        return replace(coded, codes=torch.where(zeros, middle, coded.codes))
    top = torch.as_tensor(grid.levels, dtype=grid.zero.dtype, device=grid.zero.device)
    moved = replace(grid, zero=grid.zero.round().clamp(min=0).minimum(top))
    found = Coded(quantize_rows(matrix, moved), moved)
    lost = (zeros & (coded.values() != 0)).any(1)
    return found if len(grid.scale) == 1 else found.where(lost, coded)


def lost_zeros(coded: Coded, matrix: Tensor) -> int:
    """Return how many exact zeros of a matrix its codes make something else."""
    return int(((matrix == 0) & (coded.values() != 0)).sum())
