"""Grids of evenly spaced values, and the inverse pair: weights to codes, codes to weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_CACHED = 1 << 19  # weights whose float32 copy stays in a processor's cache
_MAGIC = {torch.float32: (1.5 * 2**23, torch.int32), torch.float64: (1.5 * 2**52, torch.int64)}


@dataclass(frozen=True)
class Grid:
    """The values `scale * (q - zero)` for q = 0 .. levels, one such row of values a group.

    Args:
        scale: Floating (rows or 1, groups): the step.
        zero: Like `scale`; None on a symmetric grid, whose zero is the code `(levels + 1) // 2`.
        levels: Steps, or int64 (rows, 1) where each row has its own number.
        group_size: Neighbouring columns that share a scale.
    """

    scale: Tensor
    zero: Tensor | None
    levels: int | Tensor
    group_size: int

    def to(self, dtype: torch.dtype) -> Grid:
        zero = None if self.zero is None else self.zero.to(dtype)
        return replace(self, scale=self.scale.to(dtype), zero=zero)

    def rows(self, start: int, stop: int) -> Grid:
        """Return the grid of some rows; one that all rows share is theirs too."""
        scale, zero, levels = (_rows(p, start, stop) for p in (self.scale, self.zero, self.levels))
        return Grid(scale, zero, levels, self.group_size)


def _rows(part: Any, start: int, stop: int) -> Any:
    """Return some rows of what is a tensor with a row for each."""
    return part[start:stop] if isinstance(part, Tensor) and len(part) > 1 else part


def symmetric_zero(levels: int | Tensor) -> int | Tensor:
    """Return the code that stands for 0.0 on a symmetric grid of `levels` steps.

    >>> symmetric_zero(254)
    127
    """
    return (levels + 1) // 2


def group(matrix: Tensor, group_size: int) -> Tensor:
    """Return a (rows, columns) matrix as (rows, groups, group_size), a short last group padded.

    The padding repeats each row's last column, so that it changes no minimum or maximum.
    """
    rows, columns = matrix.shape
    short = -columns % group_size
    if short:
        matrix = torch.cat([matrix, matrix[:, -1:].expand(rows, short)], dim=1)
    return matrix.reshape(rows, -1, group_size)


def ungroup(grouped: Tensor, columns: int) -> Tensor:
    """Return (rows, groups, group_size) as the (rows, columns) matrix it came from."""
    return grouped.reshape(grouped.shape[0], -1)[:, :columns]


def quantize_rows(matrix: Tensor, grid: Grid) -> Tensor:
    """Return the code of the nearest value of the grid for each weight; ties go to the even code.

    Args:
        matrix: Floating (rows, columns).
        grid: Its grid.

    Returns:
        uint8 (rows, columns).

    >>> grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3, 4)
    >>> quantize_rows(torch.tensor([[-0.6, 0.0, 0.3, 9.0]]), grid)
    tensor([[0, 1, 2, 3]], dtype=torch.uint8)
    """
    matrix = matrix.detach()
    codes = torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    dtype = _work_dtype(matrix.dtype, grid.scale.dtype)
    for start, stop in row_chunks(*matrix.shape):
        part = _nearest(matrix[start:stop], grid.rows(start, stop), dtype)
        codes[start:stop].copy_(ungroup(part, matrix.shape[1]))
    return codes


def _nearest(matrix: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Return the codes of a few rows, grouped, in the low byte of whole numbers.

    Adding 1.5 * 2**23 (in float64 1.5 * 2**52) leaves no bits for a fraction: the sum is rounded to
    the nearest whole number, ties to even, and its last byte is that number.
    """
    scale = grid.scale.to(dtype).unsqueeze(-1)
    top = grid.levels.unsqueeze(-1).to(dtype) if isinstance(grid.levels, Tensor) else grid.levels
    step = torch.where(scale == 0, torch.inf, scale)
    codes = torch.div(group(matrix, grid.group_size), step).add_(_zero(grid, dtype))
    codes.clamp_(min=0).clamp_(max=top)  # one bound may be a tensor
    magic, whole = _MAGIC[dtype]
    return codes.add_(magic).view(whole)


def row_chunks(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield the starts and ends of runs of rows that stay in a processor's cache.

    >>> list(row_chunks(3, _CACHED // 2))
    [(0, 2), (2, 3)]
    """
    size = max(_CACHED // max(columns, 1), 1)
    for start in range(0, rows, size):
        yield start, min(start + size, rows)


def dequantize_rows(codes: Tensor, grid: Grid) -> Tensor:
    """Return `scale * (q - zero)` for each code, in float32, or float64 where the scales are.

    Args:
        codes: uint8 (rows, columns).
        grid: Their grid.

    Returns:
        Floating (rows, columns).

    >>> grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3, 4)
    >>> dequantize_rows(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), grid)
    tensor([[-0.5000,  0.0000,  0.5000,  1.0000]])
    """
    work = _work_dtype(torch.float32, grid.scale.dtype)
    values = group(codes, grid.group_size).to(work).sub_(_zero(grid, work))
    return ungroup(values.mul_(grid.scale.to(work).unsqueeze(-1)), codes.shape[1])


def wide_grid(
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


def _work_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _zero(grid: Grid, dtype: torch.dtype) -> Tensor | float:
    if grid.zero is not None:
        return grid.zero.to(dtype).unsqueeze(-1)
    zero = symmetric_zero(grid.levels)
    return zero.unsqueeze(-1).to(dtype) if isinstance(zero, Tensor) else float(zero)
