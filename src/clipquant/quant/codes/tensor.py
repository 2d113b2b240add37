"""A weight as codes on a grid, and back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.layout import Layout


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight as codes on a grid: `w = scale * (q - zero)`, folded back by its layout.

    Args:
        coded: The matrix of codes, and their grid.
        bits: Width of a code, or uint8 (rows,) where each row has its own, 0 to 8.
        layout: How the matrix folds back into the weight.
        dtype: Floating dtype of the weight.
        method: Name of the method that chose the codes.
        stream: Its codes as `entropy.encode` gives them, where a file is to hold them so; None: dense.
    """

    coded: Coded
    bits: int | Tensor
    layout: Layout
    dtype: torch.dtype
    method: str = "rtn"
    stream: Tensor | None = None

    @property
    def codes(self) -> Tensor:
        """uint8 (rows, columns)."""
        return self.coded.codes

    @property
    def grid(self) -> Grid:
        return self.coded.grid

    @property
    def scale(self) -> Tensor:
        """Floating (rows or 1, groups): the step of the grid."""
        return self.coded.grid.scale

    @property
    def zero(self) -> Tensor | None:
        """Like `scale`: the possibly fractional code of 0.0; None: symmetric, the middle code."""
        return self.coded.grid.zero

    @property
    def levels(self) -> int | None:
        """Steps of the grid where all rows share them; None with a bits vector."""
        levels = self.coded.grid.levels
        return levels if isinstance(levels, int) else None

    @property
    def group_size(self) -> int:
        """Neighbouring columns that share a scale; the last group may be short."""
        return self.coded.grid.group_size

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


def dequantize(tensor: QuantizedTensor) -> Tensor:
    """Return the weight that a quantized tensor stands for, in its shape and dtype.

    >>> from clipquant.quant.codes.ranges import plain_rounding
    >>> from clipquant.quant.codes.spec import QuantSpec
    >>> coded = plain_rounding(torch.tensor([[0.0, 1.0, 2.2, 3.0]]), QuantSpec(2))
    >>> dequantize(QuantizedTensor(coded, 2, Layout((1, 4)), torch.float32))
    tensor([[0., 1., 2., 3.]])
    """
    return tensor.layout.unfold(tensor.coded.values()).to(tensor.dtype).contiguous()
