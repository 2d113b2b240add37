"""A weight as codes on a grid, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid, dequantize_rows
from clipquant.quant.codes.layout import Layout


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as codes on a grid: `w = scale * (q - zero)`, folded back by its layout.

    Args:
        codes: uint8 (rows, columns), each from 0 to the grid's steps.
        scale: Floating (rows or 1, groups): the step of the grid.
        zero: Like `scale`: the possibly fractional code of 0.0. None: symmetric, the middle code.
        bits: Width of a code, or uint8 (rows,) where each row has its own, 0 to 8.
        levels: Steps of the grid where all rows share them; None with a bits vector.
        group_size: Neighbouring columns that share a scale; the last group may be short.
        layout: How the matrix folds back into the weight.
        dtype: Floating dtype of the weight.
        method: Name of the method that chose the codes.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int | Tensor
    levels: int | None
    group_size: int
    layout: Layout
    dtype: torch.dtype
    method: str = "rtn"

    @property
    def numel(self) -> int:
        return self.layout.numel

    @property
    def symmetric(self) -> bool:
        return self.zero is None

    @property
    def code_bits(self) -> int:
        """Bits that all codes take together, without scales."""
        if isinstance(self.bits, Tensor):
            return int(self.bits.sum()) * self.layout.columns
        return self.bits * self.numel


def grid_of(tensor: QuantizedTensor) -> Grid:
    """Return the grid on which the codes of a quantized tensor stand."""
    levels: int | Tensor
    if isinstance(tensor.bits, Tensor):
        levels = (2 ** tensor.bits.to(torch.int64) - 1).unsqueeze(1)
    else:
        assert tensor.levels is not None  # noqa: S101 - an invariant of QuantizedTensor
        levels = tensor.levels
    return Grid(tensor.scale, tensor.zero, levels, tensor.group_size)


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """Return the weight that a quantized tensor stands for, in its shape and dtype.

    >>> from clipquant.quant.codes.ranges import quantize_weight
    >>> from clipquant.quant.codes.spec import QuantSpec
    >>> dequantize(quantize_weight(torch.tensor([[0.0, 1.0, 2.2, 3.0]]), QuantSpec(2)))
    tensor([[0., 1., 2., 3.]])
    """
    weight = tensor.layout.unfold(dequantize_rows(tensor.codes, grid_of(tensor)))
    return weight.to(tensor.dtype).contiguous()


def from_codes(
    codes: Tensor, grid: Grid, bits: int | Tensor, layout: Layout, dtype: torch.dtype, method: str
) -> QuantizedTensor:
    """Return codes and their grid as one quantized tensor."""
    levels = None if isinstance(grid.levels, Tensor) else grid.levels
    return QuantizedTensor(
        codes, grid.scale, grid.zero, bits, levels, grid.group_size, layout, dtype, method
    )
