"""Grids of evenly spaced values, codes on them, and the inverse pair: weights to codes, codes to weights."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
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

    def where(self, first: Tensor, other: Grid) -> Grid:
        """Return this grid in the rows where `first`, bool (rows,), is true and `other` in the rest.

        Both have the same steps; the wider dtype of the two is taken. A grid that all rows share
        cannot be mixed: it is taken where `first` is true of every row.
        """
        if self.scale.shape[0] == 1 and len(first) > 1:
            return self if bool(first.all()) else other
        dtype, rows = torch.promote_types(self.scale.dtype, other.scale.dtype), first[:, None]
        mine, theirs = self.to(dtype), other.to(dtype)
        zero = mine.zero
        if mine.zero is not None and theirs.zero is not None:
            zero = torch.where(rows, mine.zero, theirs.zero)
        return replace(mine, scale=torch.where(rows, mine.scale, theirs.scale), zero=zero)

    @classmethod
    def stack(cls, grids: Sequence[Grid]) -> Grid:
        """Return the grids of consecutive rows as one, in the widest of their dtypes.

        Where their steps differ, each row keeps its own.
        """
        dtype = functools.reduce(torch.promote_types, (grid.scale.dtype for grid in grids))
        grids = [grid.to(dtype) for grid in grids]
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        zero = torch.cat(zeros) if len(zeros) == len(grids) else None
        return cls(
            torch.cat([g.scale for g in grids]), zero, _stacked_levels(grids), grids[0].group_size
        )


def _rows(part: Any, start: int, stop: int) -> Any:
    """Return some rows of what is a tensor with a row for each."""
    return part[start:stop] if isinstance(part, Tensor) and len(part) > 1 else part


def _stacked_levels(grids: Sequence[Grid]) -> int | Tensor:
    first = grids[0].levels
    if isinstance(first, int) and all(
        isinstance(g.levels, int) and g.levels == first for g in grids
    ):
        return first
    parts = [torch.as_tensor(g.levels, device=g.scale.device).reshape(-1, 1) for g in grids]
    return torch.cat([part.expand(len(g.scale), 1) for part, g in zip(parts, grids, strict=True)])


@dataclass(frozen=True)
class Coded:
    """A matrix as codes on a grid.

    Args:
        codes: uint8 (rows, columns), each from 0 to the grid's levels.
        grid: The values that they stand for.

    >>> grid = Grid(torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3, 4)
    >>> Coded.nearest(torch.tensor([[-0.6, 0.0, 0.3, 9.0]]), grid).values()
    tensor([[-0.5000,  0.0000,  0.5000,  1.0000]])
    """

    codes: Tensor
    grid: Grid

    @classmethod
    def nearest(cls, matrix: Tensor, grid: Grid) -> Coded:
        """Return the codes of the values that are nearest to a (rows, columns) matrix."""
        return cls(quantize_rows(matrix, grid), grid)

    def values(self) -> Tensor:
        """Return the (rows, columns) matrix that the codes stand for."""
        return dequantize_rows(self.codes, self.grid)

    def rows(self, start: int, stop: int) -> Coded:
        """Return some of the rows."""
        return Coded(self.codes[start:stop], self.grid.rows(start, stop))

    def takes(self, first: Tensor) -> Tensor:
        """Return `first`, bool (rows,), or on a grid that all rows share whether it is true of all."""
        if self.grid.scale.shape[0] == 1 and len(first) > 1:
            return first.all().expand(len(first))
        return first

    def where(self, first: Tensor, other: Coded) -> Coded:
        """Return these codes in the rows where `first`, bool (rows,), is true and `other` in the rest.

        On a grid that all rows share, all or none are taken; see `Grid.where`.
        """
        first = self.takes(first)
        codes = torch.where(first[:, None], self.codes, other.codes)
        return Coded(codes, self.grid.where(first, other.grid))

    def split(self, count: int) -> list[Coded]:
        """Return the rows in `count` runs of equal length."""
        size = -(-len(self.codes) // count)
        return [self.rows(start, start + size) for start in range(0, len(self.codes), size)]

    @classmethod
    def stack(cls, parts: Sequence[Coded]) -> Coded:
        """Return consecutive rows as one: the inverse of `split`."""
        if len(parts) == 1:
            return parts[0]
        codes = torch.cat([part.codes for part in parts])
        return cls(codes, Grid.stack([part.grid for part in parts]))


def row_levels(bits: Tensor) -> Tensor:
    """Return the steps of rows with widths of their own, int64 (rows, 1).

    Args:
        bits: uint8 (rows,), each 0 to 8.

    >>> row_levels(torch.tensor([0, 4], dtype=torch.uint8))
    tensor([[ 0],
            [15]])
    """
    return (2 ** bits.to(torch.int64) - 1).unsqueeze(1)


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
    zero = torch.as_tensor(symmetric_zero(top), device=top.device).to(dtype)
    return scale, zero.expand(columns, rows), top.to(dtype)


def _work_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def _zero(grid: Grid, dtype: torch.dtype) -> Tensor | float:
    if grid.zero is not None:
        return grid.zero.to(dtype).unsqueeze(-1)
    zero = symmetric_zero(grid.levels)
    return zero.unsqueeze(-1).to(dtype) if isinstance(zero, Tensor) else float(zero)
