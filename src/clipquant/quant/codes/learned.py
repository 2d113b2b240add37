"""Codes as something that gradients can move: offsets before the rounding, and the grid itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, symmetric_zero

_OFFSET_RATE, _GRID_RATE = 8e-2, 8e-3  # of Adam, over the number of codes
_REACH = 1.0  # steps that a code may move from where its float weight lies


@dataclass
class Rounding:
    """One weight's codes while they are learned: where each float weight lies on its grid, and an offset.

    Args:
        position: float32 (rows, columns): the float weights in steps of the first grid.
        grid: The first grid.
        offset: (rows, columns), learned: what is added before rounding.
        reach: (rows, columns): most that it may be either way, a step or as far as the first codes are off.
        stretch: Like the grid's scale, learned: log of a factor on it.
        shift: Like the grid's zero, learned: what is added to it; None on a symmetric grid.
    """

    position: Tensor
    grid: Grid
    offset: Tensor
    reach: Tensor
    stretch: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, start: Coded) -> Rounding:
        """Return the rounding of a float matrix that starts at given codes.

        >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 3, 2)
        >>> first = Coded(torch.tensor([[0, 2]]).byte(), grid)
        >>> Rounding.of(torch.tensor([[0.6, 2.2]]), first).coded().codes
        tensor([[0, 2]], dtype=torch.uint8)
        """
        grid = start.grid
        step = _wide(torch.where(grid.scale == 0, torch.inf, grid.scale).float(), grid, matrix)
        position = matrix.float() / step
        made = cls(
            position,
            grid,
            torch.zeros_like(position),
            torch.ones_like(position),
            torch.zeros_like(grid.scale, dtype=torch.float32),
            None if grid.zero is None else torch.zeros_like(grid.zero, dtype=torch.float32),
        )
        # Codes that are not the nearest ones, as GPTQ leaves them, need an offset to begin with.
        off = start.codes - position - made._zero()
        made.offset = off * (start.codes != made.coded().codes)
        made.reach = made.offset.abs().clamp(min=_REACH)
        return made

    def limit_(self) -> None:
        """Keep the offsets within their reach."""
        with torch.no_grad():
            self.offset.clamp_(-self.reach, self.reach)

    def leaves(self) -> Iterator[tuple[float, Tensor]]:
        """Yield what is learned, each with its rate: the same share of the range at every width."""
        levels = self.grid.levels
        codes = (levels if isinstance(levels, int) else int(levels.max())) + 1
        yield _OFFSET_RATE / codes, self.offset
        yield _GRID_RATE / codes, self.stretch
        if self.shift is not None:
            yield _GRID_RATE / codes, self.shift

    def matrix(self) -> Tensor:
        """Return the weights as they stand; gradients pass the rounding straight through."""
        zero, place = self._zero(), self._place()
        codes = place + (place.round() - place).detach()
        return (codes - zero) * _wide(
            self.grid.scale.float() * self.stretch.exp(), self.grid, place
        )

    def coded(self) -> Coded:
        """Return codes and grid as they stand, the grid in the dtype that the first one had."""
        scale = self.grid.scale.float() * self.stretch.detach().exp()
        zero = self.grid.zero
        if zero is not None and self.shift is not None:
            zero = (zero.float() + self.shift.detach()).to(zero.dtype)
        grid = replace(self.grid, scale=scale.to(self.grid.scale.dtype), zero=zero)
        return Coded(self._place().detach().round().to(torch.uint8), grid)

    def _place(self) -> Tensor:
        """Return where the weights lie between the codes 0 and `levels`."""
        steps = self.position / _wide(self.stretch.exp(), self.grid, self.position)
        top = torch.as_tensor(self.grid.levels, dtype=steps.dtype, device=steps.device)
        return (steps + self.offset + self._zero()).clamp(min=0).minimum(top)

    def _zero(self) -> Tensor:
        if self.grid.zero is None:
            middle = torch.as_tensor(symmetric_zero(self.grid.levels), device=self.position.device)
            return middle.to(self.position).expand(len(self.position), 1)
        zero = self.grid.zero.float()
        return _wide(zero if self.shift is None else zero + self.shift, self.grid, self.position)


def _wide(part: Tensor, grid: Grid, matrix: Tensor) -> Tensor:
    """Return one number a group as one number a weight."""
    rows, columns = matrix.shape
    return part.expand(rows, -1).repeat_interleave(grid.group_size, 1)[:, :columns]
