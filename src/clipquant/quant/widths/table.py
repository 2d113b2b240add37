"""One weight at every width at once: any choice of widths, one a row, can be taken from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, row_levels


@dataclass(frozen=True)
class RowTable:
    """A weight's codes at every width.

    Args:
        coded: Width -> codes (rows, columns), on grids of one dtype.
        errors: float64 (rows, 9): weighted squared error of each row at each width, infinite where
            there is none.
        shifts: Width -> (rows,): mean output that is lost, for a bias to give back; empty without one.
        method: What chose the codes.
    """

    coded: Mapping[int, Coded]
    errors: Tensor
    shifts: Mapping[int, Tensor]
    method: str

    def take(self, bits: Tensor) -> Coded:
        """Return the codes of rows with these widths, uint8 (rows,)."""
        first = next(iter(self.coded.values()))
        codes, scale = torch.empty_like(first.codes), torch.empty_like(first.grid.scale)
        zero = torch.empty_like(scale)
        for width in bits.unique().tolist():
            own, coded = bits == width, self.coded[width]
            codes[own], scale[own] = coded.codes[own], coded.grid.scale[own]
            zero[own] = -1.0 if coded.grid.zero is None else coded.grid.zero[own]
        return Coded(codes, Grid(scale, zero, row_levels(bits), first.grid.group_size))

    def widths(self, bits: Tensor) -> Tensor:
        """Return the width of the codes of each row, uint8 (rows,)."""
        return bits

    def prices(self) -> Tensor:
        """Return the bytes that each row's codes take in an entropy code, float64 (rows, 9)."""
        found = torch.zeros_like(self.errors)
        for width, coded in self.coded.items():
            share = torch.bincount(coded.codes.flatten(), minlength=256).double()
            price = -(share / share.sum()).log2()
            found[:, width] = price[coded.codes.long()].sum(1) / 8
        return found

    def shift(self, bits: Tensor) -> Tensor | None:
        """Return the mean output that rows of these widths lose, (rows,); None without a bias."""
        if not self.shifts:
            return None
        lost = torch.zeros(len(bits))
        for width in bits.unique().tolist():
            lost[bits == width] = self.shifts[width][bits == width]
        return lost

    @classmethod
    def stack(cls, tables: Sequence[RowTable]) -> RowTable:
        """Return the tables of consecutive rows as one."""
        first = tables[0]
        if len(tables) == 1:
            return first
        return cls(
            {width: Coded.stack([t.coded[width] for t in tables]) for width in first.coded},
            torch.cat([t.errors for t in tables]),
            {width: torch.cat([t.shifts[width] for t in tables]) for width in first.shifts},
            first.method,
        )
