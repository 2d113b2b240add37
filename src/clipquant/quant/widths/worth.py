"""Codes that are worth their bits: what a weight's error falls by is weighed against what its code takes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.error.output_error import BLOCK

FINEST = 127  # the largest code either side of zero
_PULL = 2 * math.log(
    2
)  # of a weight's share of the error that a bit is worth: a finer step takes off so much
_SWEEPS = 3  # visits to every column, bits priced anew before each
_UNSEEN = 0.5  # what a code that no weight has counts


@dataclass(frozen=True)
class Stepped:
    """The same rows on grids of several steps around zero, those of one step after those of another.

    Args:
        codes: (steps * rows, columns), whole numbers in a floating dtype; 0 is zero.
        scale: (steps * rows, groups): the step.
        limits: (steps,): the largest code either side.
        group_size: Columns that share a scale.
        pulls: (steps,): how many times its worth a bit counts; more at coarse steps, where most codes are zero.
    """

    codes: Tensor
    scale: Tensor
    limits: Tensor
    group_size: int
    pulls: Tensor

    @classmethod
    def nearest(
        cls, matrix: Tensor, scale: Tensor, limits: Tensor, group_size: int, pulls: Tensor
    ) -> Stepped:
        """Return the codes that are nearest to a (rows, columns) matrix."""
        made = cls(matrix.repeat(len(limits), 1), scale, limits, group_size, pulls)
        wide = made.codes
        step = made.wide()
        codes = torch.where(step > 0, wide / step, 0.0).round_()
        return replace(made, codes=torch.minimum(torch.maximum(codes, -made.tops()), made.tops()))

    def tops(self) -> Tensor:
        """Return each row's largest code, (steps * rows, 1)."""
        each = len(self.codes) // len(self.limits)
        return self.limits.repeat_interleave(each)[:, None].to(self.codes.dtype)

    def wide(self) -> Tensor:
        """Return the step of every weight, or of every row where its weights share one."""
        if self.scale.shape[1] == 1:
            return self.scale
        return self.scale.repeat_interleave(self.group_size, 1)[:, : self.codes.shape[1]]

    def values(self) -> Tensor:
        return self.codes * self.wide()

    def prices(self) -> Tensor:
        """Return the bits of every code, (steps, 255), by how often the rows of one step have it."""
        size = 2 * FINEST + 1
        found = torch.empty(len(self.limits), size, dtype=torch.float64)
        for index, codes in enumerate(self.codes.chunk(len(self.limits))):
            count = torch.bincount((codes + FINEST).long().flatten(), minlength=size)
            whole = count.sum() + _UNSEEN * (2 * self.limits[index] + 1)
            found[index] = -((count + _UNSEEN) / whole).log2()
        return found.to(self.codes.dtype)

    def bits(self) -> Tensor:
        """Return the bits that each row's codes take, float64 (rows, steps)."""
        prices, parts = self.prices(), self.codes.chunk(len(self.limits))
        return torch.stack(
            [prices[i][(part + FINEST).long()].sum(1) for i, part in enumerate(parts)], 1
        ).double()


def worthy(start: Stepped, matrix: Tensor, hessian: Tensor, kept: Tensor | None) -> Stepped:
    """Return codes of less error and bits together: most weights near zero become zero.

    A bit counts as much as it lowers the error where it is spent on a smaller step, so that the codes are
    those of an entropy-coded quantizer of that step.

    Args:
        start: Where to start.
        matrix: (rows, columns): the float weights.
        hessian: (columns, columns): H of the error (w - q) H (w - q)^T.
        kept: bool (rows, columns): zeros that stay zero; None: there are none.

    Source:
        Sullivan 1996, "Efficient scalar quantization of exponential and Laplacian random variables" (the dead
        zone); Chou, Lookabaugh and Gray 1989, "Entropy-constrained vector quantization" (the Lagrangian).
    """
    wide, goal = matrix.repeat(len(start.limits), 1), matrix @ hessian
    goal = goal.repeat(len(start.limits), 1)
    held = None if kept is None else kept.repeat(len(start.limits), 1).T
    best = start
    slope = (best.values() - wide) @ hessian
    error = ((best.values() - wide) * slope).sum(1).clamp(min=0)
    for _ in range(_SWEEPS):
        best, slope = _swept(best, slope, hessian, held, error)
        best, slope = _rescaled(best, slope, goal)
    return best


def worthy_apart(start: Stepped, matrix: Tensor, weight: Tensor, kept: Tensor | None) -> Stepped:
    """Return the same for an error that is a sum over weights.

    Args:
        start: Where to start.
        matrix: (rows, columns): the float weights.
        weight: (rows, columns): what each weight's squared error counts.
        kept: As for `worthy`.
    """
    times, best = len(start.limits), start
    wide, weight = matrix.repeat(times, 1), weight.repeat(times, 1)
    for _ in range(_SWEEPS):
        step = best.wide()
        at = torch.where(step > 0, wide / step, 0.0)
        curve = weight * step.square()
        error = ((best.codes - at).square() * curve).sum(1)
        codes = _chosen(at, curve, _worth(best, error), best)
        if kept is not None:
            codes.masked_fill_(kept.repeat(times, 1), 0.0)
        best = replace(best, codes=codes)
        if best.scale.shape[1] == 1:
            best = _at_scale(best, (weight * codes * wide).sum(1), (weight * codes.square()).sum(1))
    return best


def _worth(held: Stepped, error: Tensor) -> Tensor:
    """Return what each code costs in each row, in its error: (steps * rows, 255)."""
    each = len(held.codes) // len(held.limits)
    pull = error * (_PULL / max(held.codes.shape[1], 1)) * held.pulls.repeat_interleave(each)
    return held.prices().repeat_interleave(each, 0) * pull[:, None]


def _chosen(at: Tensor, curve: Tensor, worth: Tensor, held: Stepped) -> Tensor:
    """Return for each weight the best of the nearest code, the next towards zero, and zero."""
    top = held.tops()
    best = torch.minimum(torch.maximum(at.round(), -top), top)
    least: Tensor | None = None
    near = best
    for code in (near, near - near.sign(), torch.zeros_like(near)):
        cost = curve * (code - at).square() + worth.gather(1, (code + FINEST).long())
        if least is None:
            least = cost
            continue
        better = cost < least
        best, least = torch.where(better, code, best), torch.where(better, cost, least)
    return best


def _swept(
    held: Stepped, slope: Tensor, hessian: Tensor, kept: Tensor | None, error: Tensor
) -> tuple[Stepped, Tensor]:
    """Return the codes after one visit to every column, each at its best given all others, and H (q - w)."""
    rows, columns = held.codes.shape
    scale = held.wide().T.expand(columns, rows)
    current, slope = held.codes.T.contiguous(), slope.T.contiguous()
    diagonal, top = hessian.diagonal(), held.tops()[:, 0]
    curve = diagonal[:, None] * scale
    rate = torch.where(curve > 0, 1 / curve, 0.0)
    curve = curve * scale
    worth = _worth(held, error).flatten()
    first = torch.arange(rows) * (2 * FINEST + 1) + FINEST
    zero = worth[first]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        inner = hessian[start:stop, start:stop]
        local, old = slope[start:stop].clone(), current[start:stop].clone()
        for i in range(stop - start):
            j = start + i
            at = current[j] - local[i] * rate[j]
            near = torch.minimum(torch.maximum(at.round(), -top), top)
            less = near - near.sign()
            codes = torch.stack((near, less))
            cost = (codes - at).square_().mul_(curve[j]) + worth[first + codes.long()]
            code = torch.where(cost[1] < cost[0], less, near)
            nothing = at.square_().mul_(curve[j]).add_(zero) < cost.amin(0)
            code.masked_fill_(nothing if kept is None else nothing | kept[j], 0.0)
            local[i:].addr_(inner[i, i:], (code - current[j]).mul_(scale[j]))
            current[j] = code
        moved = (current[start:stop] - old).mul_(scale[start:stop])
        slope.addmm_(hessian[:, start:stop], moved)
    return replace(held, codes=current.T.contiguous()), slope.T.contiguous()


def _rescaled(held: Stepped, slope: Tensor, goal: Tensor) -> tuple[Stepped, Tensor]:
    """Return rows of one scale with that of least error for their codes, and H (q - w) there."""
    if held.scale.shape[1] > 1:
        return held, slope
    step = torch.where(held.scale > 0, held.scale, 1.0)
    product = (slope + goal) / step  # q H
    curve = (held.codes * product).sum(1, dtype=torch.float64)
    moved = _at_scale(held, (held.codes * goal).sum(1, dtype=torch.float64), curve)
    return moved, product.mul_(moved.scale).sub_(goal)


def _at_scale(held: Stepped, gain: Tensor, curve: Tensor) -> Stepped:
    """Return rows at the scale of least error, `gain / curve`, where that is one."""
    found = (gain / curve)[:, None]
    good = (gain > 0)[:, None] & (curve > 0)[:, None] & torch.isfinite(found)
    return replace(held, scale=torch.where(good, found.to(held.scale.dtype), held.scale))
