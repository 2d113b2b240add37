"""A grid that training has left behind: what was trained is what is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.tensor import QuantizedTensor

METHOD = "qat"  # what is said to have chosen codes that were trained


@dataclass(frozen=True)
class TrainedGrid:
    """A weight's grid as training has left it; its codes are those of the nearest values.

    Args:
        grid: The grid.
        bits: Width of a code, or uint8 (rows,) where each row has its own.
        layout: How the weight folds into rows.
        inputs: The ends of the range of what its layer is called with, where that was trained too.

    >>> trained = TrainedGrid(Grid(torch.tensor([[0.5]]), None, 2, 3), 2, Layout((1, 3)))
    >>> trained.tensor(torch.tensor([[-0.6, 0.1, 0.4]])).coded.values()
    tensor([[-0.5000,  0.0000,  0.5000]])
    """

    grid: Grid
    bits: int | Tensor
    layout: Layout
    inputs: tuple[float, float] | None = None

    def tensor(self, weight: Tensor) -> QuantizedTensor:
        """Return a weight on this grid, each of its values the nearest."""
        coded = Coded.nearest(self.layout.fold(weight.detach()), self.grid)
        return QuantizedTensor(coded, self.bits, self.layout, weight.dtype, METHOD)

    def to(self, device: torch.device) -> TrainedGrid:
        """Return the same grid on a device."""
        grid = self.grid
        zero = None if grid.zero is None else grid.zero.to(device)
        levels = grid.levels.to(device) if isinstance(grid.levels, Tensor) else grid.levels
        return replace(
            self, grid=replace(grid, scale=grid.scale.to(device), zero=zero, levels=levels)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint holds: tensors and numbers by name."""
        grid = self.grid
        return {
            "scale": grid.scale.detach().cpu(),
            "zero": None if grid.zero is None else grid.zero.detach().cpu(),
            "levels": grid.levels,
            "group_size": grid.group_size,
            "bits": self.bits,
            "layout": [list(self.layout.shape), self.layout.axis, self.layout.groups],
        }

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> TrainedGrid:
        """Return the grid that `state_dict` was taken of: its inverse."""
        grid = Grid(state["scale"], state["zero"], state["levels"], state["group_size"])
        shape, axis, groups = state["layout"]
        return cls(grid, state["bits"], Layout(tuple(shape), axis, groups))
