"""The squared output error of a matrix's codes, and the better of several codes by it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded

DAMPING = 0.01  # pull towards the float weights, as a share of H's mean diagonal
BLOCK = 128  # columns decided between two updates of all the others
_CONSTANT = 1e-5  # share of E[x^2] below which what varies of an input is rounding


def varying(hessian: Tensor, mean: Tensor) -> Tensor:
    """Return 1.0 for each input that varies, and 0.0 for one that is the same in every sample.

    Of a constant input the second moment less the squared mean is what rounding leaves, of either sign.

    Args:
        hessian: (columns, columns): E[x x^T], or (columns,), its diagonal.
        mean: (columns,): E[x].

    >>> varying(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), torch.tensor([2.0, 1.0]))
    tensor([0., 1.])
    """
    diagonal = hessian.diagonal() if hessian.dim() == 2 else hessian
    return (diagonal - mean.square() > _CONSTANT * diagonal).to(diagonal.dtype)


@dataclass(frozen=True)
class OutputError:
    """The squared output error of each row q of a matrix: `q H q^T - 2 q goal^T + energy`.

    Args:
        hessian: (columns, columns): H = E[x x^T] of the inputs x. With `inputs`, (columns,): what H has on
            its diagonal beside them.
        goal: (rows, columns): E[y x^T] of the outputs y wanted.
        energy: (rows,): E[y^2].
        inputs: (samples, columns): where they are few, H is never formed: it is
            `inputs^T inputs + diag(hessian)`.
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor
    inputs: Tensor | None = None

    def diagonal(self) -> Tensor:
        """Return H's diagonal, (columns,)."""
        if self.inputs is None:
            return self.hessian.diagonal()
        return self.inputs.square().sum(0).add_(self.hessian)

    def product(self, values: Tensor) -> Tensor:
        """Return `values H` of (rows, columns) values."""
        if self.inputs is None:
            return values @ self.hessian
        return torch.addmm(values * self.hessian, values @ self.inputs.T, self.inputs)

    def inner(self, part: slice) -> Tensor:
        """Return the square of H that belongs to some columns."""
        if self.inputs is None:
            return self.hessian[part, part]
        some = self.inputs[:, part]
        return (some.T @ some).add_(self.hessian[part].diag())

    def slope(self, values: Tensor) -> Tensor:
        """Return half the gradient of the error at some (rows, columns) values."""
        if self.inputs is None:
            return torch.addmm(self.goal, values, self.hessian, beta=-1)
        return self.product(values).sub_(self.goal)

    def at(self, values: Tensor, slope: Tensor | None = None) -> Tensor:
        """Return the error of each row of (rows, columns) values, whose slope may be known.

        >>> error = OutputError(torch.eye(2), torch.ones(1, 2), torch.tensor([2.0]))
        >>> error.at(torch.tensor([[1.0, 0.0]]))
        tensor([1.])
        """
        slope = self.slope(values) if slope is None else slope
        return (values * (slope - self.goal)).sum(1) + self.energy

    def of(self, coded: Coded) -> Tensor:
        """Return the error of each row of some codes."""
        return self.at(coded.values().to(self.hessian.dtype))

    def shrunk(self, matrix: Tensor, share: float) -> OutputError:
        """Return the error with a share of it replaced by that of inputs which are not correlated.

        Args:
            matrix: (rows, columns): the float weights, which are then what is wanted.
            share: 0 to 1: how much of H off its diagonal is chance; see `Moments.noise`.
        """
        diagonal = self.diagonal()
        own = matrix.to(diagonal.dtype) * diagonal
        goal = torch.lerp(self.goal, own, share)
        energy = torch.lerp(self.energy, (own * matrix).sum(1), share)
        if self.inputs is not None:
            beside = torch.lerp(self.hessian, diagonal, share)
            return OutputError(beside, goal, energy, self.inputs * math.sqrt(1 - share))
        hessian = self.hessian * (1 - share)
        hessian.diagonal().copy_(diagonal)
        return OutputError(hessian, goal, energy)

    def towards(self, weights: Tensor, best: Tensor) -> OutputError:
        """Return the error whose least, as large as this one's, is at other weights.

        Args:
            weights: (rows, columns).
            best: (rows, columns): the weights of least error here.
        """
        least = self.energy - (self.goal * best).sum(1)
        goal = self.product(weights)
        return replace(self, goal=goal, energy=least + (weights * goal).sum(1))

    def damped(self, matrix: Tensor, damping: float) -> OutputError:
        """Return the error with a pull towards the float weights, which makes H invertible.

        Args:
            matrix: (rows, columns): the float weights.
            damping: The pull, as a share of H's mean diagonal; inputs that are always zero get the mean.
        """
        diagonal = self.diagonal()
        live = diagonal > 0
        mean = diagonal.sum() / live.sum().clamp(min=1)  # those that are not live add nothing
        mean = torch.where(mean > 0, mean, torch.ones_like(mean))
        pull = torch.where(live, damping * mean, (1 + damping) * mean)
        if self.inputs is None:
            hessian = self.hessian.clone()
            hessian.diagonal().add_(pull)
        else:
            hessian = self.hessian + pull
        goal = torch.addcmul(self.goal, matrix.to(pull.dtype), pull)
        energy = self.energy + (matrix.square() * pull).sum(1)
        return OutputError(hessian, goal, energy, self.inputs)


def best_of(error: OutputError, candidates: Iterable[Coded]) -> tuple[Coded, Tensor]:
    """Return for each row the candidate of least output error, and those errors.

    A grid that all rows share is chosen as a whole.
    """
    best: tuple[Coded, Tensor] | None = None
    for coded in candidates:
        own = error.of(coded)
        if best is None:
            best = coded, own
            continue
        better = own < best[1]
        if coded.grid.scale.shape[0] == 1 and len(own) > 1:
            better = (own.sum() < best[1].sum()).expand(len(own))
        best = coded.where(better, best[0]), torch.where(better, own, best[1])
    if best is None:
        raise ValueError("best_of needs one candidate or more; got none.")
    return best
