"""Codes that gradients move: latent codes, rounded on the way forward, passed straight through on the way back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, group, symmetric_zero, ungroup

_NEAR = (
    0.3  # share of its way from the nearest code at which a weight begins: few steps flip no code
)


@dataclass
class Latent:
    """One weight's latent codes, float numbers that round to its codes, and its grid, all learned.

    The weights are `scale * (q - zero)` with q the latent codes rounded. The gradient of the scale
    and of the zero is the exact one, given the codes; rounding counts as the identity.

    Args:
        place: float32 (rows, columns), learned: the latent codes, from half a step below 0 to half a
            step above the top code, so that none is out of reach of a gradient.
        grid: The first grid.
        stretch: Like the grid's scale, learned: log of a factor on it, so that no step changes its sign.
        shift: Like the grid's zero, learned: what is added to it; None on a symmetric grid.

    Source:
        Bengio et al. 2013, arXiv 1308.3432 (straight through); Esser et al. 2019, arXiv 1902.08153
        (LSQ: learned steps); Bhalgat et al. 2020, arXiv 2004.09576 (LSQ+: learned zeros).
    """

    place: Tensor
    grid: Grid
    stretch: Tensor
    shift: Tensor | None

    @classmethod
    def of(cls, matrix: Tensor, start: Coded) -> Latent:
        """Return latent codes that begin at given codes, a little towards the weights that are nearest to them.

        A weight that the start has given another code than the nearest one begins in the middle of that
        code. At the edge the first steps would flip it, and thousands at once undo what the start has done.

        >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 3, 2)
        >>> first = Coded(torch.tensor([[0, 2]]).byte(), grid)
        >>> made = Latent.of(torch.tensor([[0.7, 2.25]]), first)
        >>> made.place, made.coded().codes
        (tensor([[0.0000, 2.0750]]), tensor([[0, 2]], dtype=torch.uint8))
        """
        grid, codes = start.grid, start.codes.float()
        stretch = torch.zeros_like(grid.scale, dtype=torch.float32)
        made = cls(codes, grid, stretch, None if grid.zero is None else stretch.clone())
        scale, zero = (part.float().unsqueeze(-1) for part in made._grid())
        step = torch.where(scale == 0, torch.inf, scale)
        place = ungroup(group(matrix.float(), grid.group_size) / step + zero, matrix.shape[1])
        off = place - codes
        made.place = codes + torch.where(off.abs() <= 0.5, _NEAR * off, 0.0)
        return made

    def leaves(self) -> Iterator[tuple[bool, Tensor]]:
        """Yield what is learned, and whether it is of the grid."""
        yield False, self.place
        yield True, self.stretch
        if self.shift is not None:
            yield True, self.shift

    def matrix(self) -> Tensor:
        """Return the weights as they stand, as part of a graph."""
        scale, zero = (part.float().unsqueeze(-1) for part in self._grid())
        grouped = group(self.place, self.grid.group_size)
        found: Tensor = _Straight.apply(grouped, scale, zero, _top(self.grid))  # type: ignore[no-untyped-call]
        return ungroup(found, self.place.shape[1])

    def limit_(self) -> None:
        """Keep the latent codes within half a step of the grid."""
        with torch.no_grad():
            self.place.clamp_(min=-0.5)
            levels = self.grid.levels
            top = levels.to(self.place) if isinstance(levels, Tensor) else levels
            self.place.clamp_(max=top + 0.5)

    def coded(self) -> Coded:
        """Return codes and grid as they stand, the grid in the dtype that the first one had."""
        grid = self.grid
        scale, zero = (part.detach() for part in self._grid())
        kept = None if grid.zero is None else zero.to(grid.zero.dtype)
        grid = replace(grid, scale=scale.to(grid.scale.dtype), zero=kept)
        top = torch.as_tensor(grid.levels, device=self.place.device)
        codes = self.place.detach().round().clamp(min=0).minimum(top.to(self.place))
        return Coded(codes.to(torch.uint8), grid)

    def _grid(self) -> tuple[Tensor, Tensor]:
        """Return scale and zero as they will be stored, as part of a graph."""
        scale = stored(self.grid.scale, factor=self.stretch.exp())
        if self.grid.zero is None or self.shift is None:
            middle = torch.as_tensor(symmetric_zero(self.grid.levels), device=scale.device)
            return scale, middle.float().reshape(-1, 1)
        return scale, stored(self.grid.zero, term=self.shift)


class _Straight(torch.autograd.Function):
    """`scale * (round(place) - zero)`, grouped; rounding is passed straight through."""

    @staticmethod
    def forward(ctx: Any, place: Tensor, scale: Tensor, zero: Tensor, top: Any) -> Tensor:
        centred = place.round().clamp_(min=0).clamp_(max=top).sub_(zero)
        ctx.save_for_backward(centred, scale)
        ctx.zero = zero.shape
        return centred * scale

    @staticmethod
    def backward(ctx: Any, *slopes: Any) -> Any:
        (slope,) = slopes
        centred, scale = ctx.saved_tensors
        of_scale = (slope * centred).sum_to_size(scale.shape)
        through = slope * scale
        of_zero = -through.sum_to_size(ctx.zero) if ctx.needs_input_grad[2] else None
        return through, of_scale, of_zero, None


def stored(first: Tensor, *, factor: Tensor | float = 1.0, term: Tensor | float = 0.0) -> Tensor:
    """Return `first * factor + term` rounded to the dtype of `first`, which is passed straight through."""
    wide = first.to(torch.promote_types(first.dtype, torch.float32)) * factor + term
    return wide + (wide.to(first.dtype) - wide).detach()


def _top(grid: Grid) -> int | Tensor:
    return grid.levels.float().unsqueeze(-1) if isinstance(grid.levels, Tensor) else grid.levels
