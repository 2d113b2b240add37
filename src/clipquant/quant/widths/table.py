"""One weight at every width at once: any choice of widths, one a row, can be taken from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Grid


@dataclass(frozen=True)
class RowTable:
    """A weight's codes and grids at every width.

    Args:
        codes: Width -> uint8 (rows, columns).
        grids: Width -> the grid of those codes, all of one dtype.
        errors: float64 (rows, 9): weighted squared error of each row at each width, infinite where
            there is none.
        shifts: Width -> (rows,): mean output that is lost, for a bias to give back; empty without one.
        method: What chose the codes.
    """

    codes: Mapping[int, Tensor]
    grids: Mapping[int, Grid]
    errors: Tensor
    shifts: Mapping[int, Tensor]
    method: str

    def take(self, bits: Tensor) -> tuple[Tensor, Grid]:
        """Return the codes and grid of rows with these widths, uint8 (rows,)."""
        first = next(iter(self.grids.values()))
        codes = torch.empty_like(next(iter(self.codes.values())))
        scale, zero = torch.empty_like(first.scale), torch.empty_like(first.scale)
        for width in bits.unique().tolist():
            own, grid = bits == width, self.grids[width]
            codes[own], scale[own] = self.codes[width][own], grid.scale[own]
            zero[own] = -1.0 if grid.zero is None else grid.zero[own]
        levels = (2 ** bits.long() - 1).unsqueeze(1)
        return codes, Grid(scale, zero, levels, first.group_size)

    def shift(self, bits: Tensor) -> Tensor | None:
        """Return the mean output that rows of these widths lose, (rows,); None without a bias."""
        if not self.shifts:
            return None
        found = torch.zeros(len(bits))
        for width in bits.unique().tolist():
            found[bits == width] = self.shifts[width][bits == width]
        return found


def join_rows(tables: Sequence[RowTable]) -> RowTable:
    """Return the tables of consecutive rows as one."""
    first = tables[0]
    if len(tables) == 1:
        return first
    return RowTable(
        {w: torch.cat([t.codes[w] for t in tables]) for w in first.codes},
        {w: stack_grids([t.grids[w] for t in tables], g.levels) for w, g in first.grids.items()},
        torch.cat([t.errors for t in tables]),
        {w: torch.cat([t.shifts[w] for t in tables]) for w in first.shifts},
        first.method,
    )


def stack_grids(grids: Sequence[Grid], levels: int | Tensor | None = None) -> Grid:
    """Return grids of rows as one; without `levels`, every row keeps its own."""
    if levels is None:
        levels = torch.cat([torch.full((len(g.scale), 1), int(g.levels)) for g in grids])
    zero = torch.cat([g.zero for g in grids if g.zero is not None])
    return Grid(torch.cat([g.scale for g in grids]), zero, levels, grids[0].group_size)
