"""Second moments of inputs, added up piece by piece; few inputs of many columns are kept as they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.network.layers import Target
from clipquant.quant.network.noise import Noise

_WIDE = 512  # columns from which few inputs are kept in place of their moments
_FEW = 6  # as long as there are this many columns for each
_SIDE = 1024  # columns of a block of a product that is symmetric


@dataclass(frozen=True)
class Moments:
    """Second moments of a weight W's inputs, averaged over positions: all that its output error needs.

    With x the inputs in the network quantized so far and y = W f the outputs in the float one:

    Args:
        hessian: (groups, columns, columns): E[x x^T]; the weight's rows fall evenly into the groups.
            (groups, columns), the diagonal alone, where all of it would take too much memory.
        goal: (groups, rows / groups, columns): E[y x^T]; W E[x^2] with a diagonal.
        energy: (groups, rows / groups): E[y^2].
        mean: (groups, columns): E[x].
        output: (groups, rows / groups): E[y].
        count: Positions averaged over.
        noise: Share of the hessian's square off its diagonal that is chance, by how much it differs
            from piece to piece of the data: 1 where too few were seen to know anything.
        inputs: (groups, positions, columns), divided by the root of `count`: where they are few, in place
            of the hessian, which is then (groups, columns) of zeros.
        apart: The same of data held apart, by which what was fitted to these is judged.
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor
    mean: Tensor
    output: Tensor
    count: int
    noise: float = 0.0
    inputs: Tensor | None = None
    apart: Moments | None = None

    def means(self) -> tuple[Tensor, Tensor]:
        """Return E[x] and E[y] over all data, those held apart included."""
        if self.apart is None:
            return self.mean, self.output
        share = self.apart.count / (self.count + self.apart.count)
        mean = torch.lerp(self.mean, self.apart.mean, share)
        return mean, torch.lerp(self.output, self.apart.output, share)


class Sums:
    """Running sums of one weight's moments."""

    def __init__(self, target: Target, limit: int, few: bool) -> None:
        self.matrix = target.layout.fold(target.weight.detach()).float()
        self.limit, self.few = limit, few and self.matrix.shape[1] >= _WIDE
        self.held: list[Tensor] = []  # inputs, as long as they are few
        self.count = 0

    def add_(self, x: Tensor, f: Tensor) -> None:
        """Add the quantized network's inputs x and the float one's f, (groups, positions, columns)."""
        groups, positions, columns = x.shape
        weight = self.matrix.to(x.device).reshape(groups, -1, columns)
        if not self.count:
            self.full = groups * columns * columns * 4 <= self.limit
            self.hessian = x.new_zeros(groups, columns)
            self.goal = torch.zeros_like(weight)
            self.energy, self.output = x.new_zeros(2, *weight.shape[:2])
            self.mean = x.new_zeros(groups, columns)
            self.noise = Noise(x)
        y = f @ weight.mT
        self.count += positions
        if self.full or self.few:
            self.goal.baddbmm_(y.mT, x)
            self._hold_(x)
        else:
            self.hessian += x.square().sum(1)
        self.energy += y.square().sum(1)
        self.output += y.sum(1)
        self.mean += x.sum(1)

    def _hold_(self, x: Tensor) -> None:
        """Keep inputs while they are few; from then on their products alone."""
        columns = x.shape[2]
        wide = x.shape[1] < columns
        part = x if wide else x.mT @ x
        (self.noise.add_gram_ if wide else self.noise.add_)(part)
        if self.few and self.count * _FEW <= columns:
            self.held.append(x)
            return
        self.few = False
        if self.hessian.dim() == 2:
            self.hessian = x.new_zeros(x.shape[0], columns, columns)
        for held in self.held:
            add_lower_(self.hessian, held)
        self.held.clear()
        if wide:
            add_lower_(self.hessian, x)
        else:
            self.hessian += part

    def result(self) -> Moments:
        n = self.count
        inputs = torch.cat(self.held, 1) if self.held else None
        noise = 0.0
        if inputs is not None:
            noise = self.noise.share_few(inputs)
            inputs = inputs / math.sqrt(n)
        hessian = self.hessian
        if self.hessian.dim() == 3:
            mirror_(hessian)
            noise = self.noise.share(hessian)
        elif inputs is None:
            weight = self.matrix.to(hessian.device).reshape(self.goal.shape)
            self.goal = weight * hessian[:, None]
            self.energy = (self.goal * weight).sum(2)
        return Moments(
            hessian.div_(n),
            self.goal.div_(n),
            self.energy / n,
            self.mean / n,
            self.output / n,
            n,
            noise,
            inputs,
        )


def add_lower_(total: Tensor, x: Tensor) -> None:
    """Add `x^T x` of (groups, positions, columns) to (groups, columns, columns), its lower part in blocks.

    What stands above the blocks on the diagonal is left as it is, for `mirror_` to fill.
    """
    for start in range(0, x.shape[2], _SIDE):
        stop = start + _SIDE
        total[:, start:stop, :stop].baddbmm_(x[:, :, start:stop].mT, x[:, :, :stop])


def mirror_(total: Tensor) -> None:
    """Fill what stands above the blocks on the diagonal of a symmetric matrix from below them."""
    for start in range(0, total.shape[2], _SIDE):
        stop = start + _SIDE
        total[:, start:stop, stop:] = total[:, stop:, start:stop].mT
