"""A weight's grid while it is trained: where it starts, what of it is learned, and what it is now."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, group, symmetric_zero, ungroup
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.ranges import extremes, grid_between, mse_grid, narrow
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.straight import stored
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.training.fake import FakeQuantize

_FITS = 6  # rounds of least squares between codes and grid


@dataclass
class LearnedGrid:
    """One weight's grid, which a loss can move; the weight itself stays the module's parameter.

    Args:
        first: The grid that training began with; its dtypes are those that are stored.
        stretch: Like the scale, learned: log of a factor on it, so that no step changes its sign.
        shift: Like the zero, learned: what is added to it; None on a symmetric grid.

    >>> first = TrainedGrid(Grid(torch.ones(1, 1), torch.zeros(1, 1), 3, 2), 2, Layout((1, 2)))
    >>> LearnedGrid.of(first).fake(torch.tensor([[0.6, 9.0]])).detach()
    tensor([[1., 3.]])
    """

    first: TrainedGrid
    stretch: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, first: TrainedGrid, learn: bool = True) -> LearnedGrid:
        """Return the grid at its start.

        Args:
            first: Where it starts.
            learn: Whether its scale and zero take gradients; zeros that are all whole codes stay, since
                weights that are exactly 0 may need them.
        """
        wide = torch.promote_types(first.grid.scale.dtype, torch.float32)
        stretch = torch.zeros_like(first.grid.scale, dtype=wide, requires_grad=learn)
        shift = None
        if first.grid.zero is not None:
            whole = bool(
                (first.grid.zero == first.grid.zero.round()).all()
            )  # an exact zero stays one
            shift = torch.zeros_like(stretch, requires_grad=learn and not whole)
        return cls(first, stretch, shift)

    def leaves(self) -> Iterator[Tensor]:
        """Yield what is learned."""
        yield from (t for t in (self.stretch, self.shift) if t is not None and t.requires_grad)

    def fake(self, weight: Tensor) -> Tensor:
        """Return a weight on the grid as it stands, in its own dtype, as part of a graph.

        A weight that takes no gradient leaves the grid where it is.
        """
        scale, zero = self._grid()
        if not weight.requires_grad:
            scale, zero = scale.detach(), zero.detach()
        matrix = self.first.layout.fold(weight)
        grouped = group(matrix, self.first.grid.group_size)
        found: Tensor = FakeQuantize.apply(  # type: ignore[no-untyped-call]
            grouped, scale.unsqueeze(-1), zero.unsqueeze(-1), _top(self.first.grid)
        )
        return self.first.layout.unfold(ungroup(found, matrix.shape[1])).to(weight.dtype)

    def now(self) -> TrainedGrid:
        """Return the grid as it stands and will be stored."""
        grid = self.first.grid
        scale, zero = (part.detach() for part in self._grid())
        kept = None if grid.zero is None else zero.to(grid.zero.dtype)
        return replace(self.first, grid=replace(grid, scale=scale.to(grid.scale.dtype), zero=kept))

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on from here."""
        shift = None if self.shift is None else self.shift.detach().cpu()
        return {
            **self.first.state_dict(),
            "stretch": self.stretch.detach().cpu(),
            "shift": shift,
        }

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], learn: bool, device: torch.device
    ) -> LearnedGrid:
        """Return the grid that `state_dict` was taken of, on a device; that of a `TrainedGrid` will do."""
        made = cls.of(TrainedGrid.from_state_dict(state).to(device), learn)
        made.stretch.detach().copy_(torch.as_tensor(state.get("stretch", 0.0)))
        if made.shift is not None:
            made.shift.detach().copy_(torch.as_tensor(state.get("shift", 0.0)))
        return made

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero as they will be stored, as part of a graph."""
        grid = self.first.grid
        scale = stored(grid.scale, factor=self.stretch.exp())
        if grid.zero is None or self.shift is None:
            middle = torch.as_tensor(symmetric_zero(grid.levels), device=scale.device)
            return scale, middle.to(scale.dtype).reshape(-1, 1)
        return scale, stored(grid.zero, term=self.shift)


def first_grid(weight: Tensor, layout: Layout, spec: QuantSpec) -> TrainedGrid:
    """Return the grid on which the training of a weight begins: that of least squared error found.

    From the best shrunk range on, codes and grid are fitted to each other in turn. A group of one value
    gets a range around zero as large as that value, or as inputs of unit variance take, to grow into.

    Args:
        weight: The weight.
        layout: How it folds into rows.
        spec: Its steps, symmetry and granularity.

    Source:
        Lloyd 1982 and Max 1960, with evenly spaced values.

    >>> grid = first_grid(torch.tensor([[-1.0, 1.0, -1.0, 1.1]]), Layout((1, 4)), QuantSpec(1)).grid
    >>> [round(float(v), 2) for v in Coded.nearest(torch.tensor([[-9.0, 9.0]]), grid).values()[0]]
    [-1.0, 1.05]
    """
    matrix = layout.fold(weight.detach())
    matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    low, high = extremes(matrix, spec)
    grid = _fitted(matrix, mse_grid(matrix, spec).to(torch.float64))
    alone = (low == high) | ~(grid.scale > 0)
    reach = torch.maximum(low.abs(), high.abs())
    reach = torch.where(reach > 0, reach, matrix.shape[1] ** -0.5)
    wide = grid_between(-reach, reach, spec, matrix.shape[1])
    zero = grid.zero
    if zero is not None and wide.zero is not None:
        zero = torch.where(alone, wide.zero, zero)
    grid = replace(grid, scale=torch.where(alone, wide.scale, grid.scale), zero=zero)
    return TrainedGrid(narrow(grid, torch.zeros_like(alone)), spec.width, layout)


def _fitted(matrix: Tensor, grid: Grid) -> Grid:
    """Return a grid after rounds of least squares, each group's the best that was found."""
    grouped, shape = group(matrix, grid.group_size).double(), grid.scale.shape
    best, least = grid, _errors(matrix, grid)
    for _ in range(_FITS):
        codes = group(Coded.nearest(matrix, grid).codes, grid.group_size).double()
        grid = _least_squares(grouped, codes, grid)
        errors = _errors(matrix, grid)
        better = (errors < least) & (grid.scale > 0) & grid.scale.isfinite()
        zero = best.zero
        if zero is not None and grid.zero is not None:
            zero = torch.where(better, grid.zero, zero)
        best = replace(best, scale=torch.where(better, grid.scale, best.scale), zero=zero)
        least = torch.where(better, errors, least).reshape(shape)
        grid = best
    return best


def _least_squares(weights: Tensor, codes: Tensor, grid: Grid) -> Grid:
    """Return the scale and zero of least squared error for given codes, all (rows, groups, size)."""
    shape = (*grid.scale.shape, 1)

    def total(values: Tensor) -> Tensor:
        return values.sum_to_size(shape).squeeze(-1)

    if grid.zero is None:
        codes = codes - symmetric_zero(grid.levels)
        return replace(grid, scale=total(weights * codes) / total(codes.square()))
    count = total(torch.ones_like(codes))
    mean_codes, mean_weights = total(codes) / count, total(weights) / count
    spread = total(codes.square()) / count - mean_codes.square()
    scale = (total(weights * codes) / count - mean_codes * mean_weights) / spread
    return replace(grid, scale=scale, zero=mean_codes - mean_weights / scale)


def _errors(matrix: Tensor, grid: Grid) -> Tensor:
    off = group(Coded.nearest(matrix, grid).values() - matrix, grid.group_size).double()
    errors = off.square().sum_to_size((*grid.scale.shape, 1)).squeeze(-1)
    return errors.nan_to_num(torch.inf)


def _top(grid: Grid) -> int | Tensor:
    return grid.levels.float().unsqueeze(-1) if isinstance(grid.levels, Tensor) else grid.levels
