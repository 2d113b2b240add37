"""The squared output error of a matrix's codes, and the better of several codes by it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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
        hessian: (columns, columns): E[x x^T].
        mean: (columns,): E[x].

    >>> varying(torch.tensor([[4.0, 2.0], [2.0, 2.0]]), torch.tensor([2.0, 1.0]))
    tensor([0., 1.])
    """
    diagonal = hessian.diagonal()
    return (diagonal - mean.square() > _CONSTANT * diagonal).to(hessian.dtype)


@dataclass(frozen=True)
class OutputError:
    """The squared output error of each row q of a matrix: `q H q^T - 2 q goal^T + energy`.

    Args:
        hessian: (columns, columns): E[x x^T] of the inputs x.
        goal: (rows, columns): E[y x^T] of the outputs y wanted.
        energy: (rows,): E[y^2].
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor

    def slope(self, values: Tensor) -> Tensor:
        """Return half the gradient of the error at some (rows, columns) values."""
        return torch.addmm(self.goal, values, self.hessian, beta=-1)

    def at(self, values: Tensor) -> Tensor:
        """Return the error of each row of (rows, columns) values.

        >>> error = OutputError(torch.eye(2), torch.ones(1, 2), torch.tensor([2.0]))
        >>> error.at(torch.tensor([[1.0, 0.0]]))
        tensor([1.])
        """
        return (values * (self.slope(values) - self.goal)).sum(1) + self.energy

    def of(self, coded: Coded) -> Tensor:
        """Return the error of each row of some codes."""
        return self.at(coded.values().to(self.hessian.dtype))

    def shrunk(self, matrix: Tensor, share: float) -> OutputError:
        """Return the error with a share of it replaced by that of inputs which are not correlated.

        Args:
            matrix: (rows, columns): the float weights, which are then what is wanted.
            share: 0 to 1: how much of H off its diagonal is chance; see `Moments.noise`.
        """
        diagonal = self.hessian.diagonal()
        hessian = self.hessian * (1 - share)
        hessian.diagonal().copy_(diagonal)
        own = matrix.to(diagonal.dtype) * diagonal
        goal = torch.lerp(self.goal, own, share)
        return OutputError(hessian, goal, torch.lerp(self.energy, (own * matrix).sum(1), share))

    def towards(self, weights: Tensor, best: Tensor) -> OutputError:
        """Return the error whose least, as large as this one's, is at other weights.

        Args:
            weights: (rows, columns).
            best: (rows, columns): the weights of least error here.
        """
        least = self.energy - (self.goal * best).sum(1)
        goal = weights @ self.hessian
        return OutputError(self.hessian, goal, least + (weights * goal).sum(1))

    def damped(self, matrix: Tensor, damping: float) -> OutputError:
        """Return the error with a pull towards the float weights, which makes H invertible.

        Args:
            matrix: (rows, columns): the float weights.
            damping: The pull, as a share of H's mean diagonal; inputs that are always zero get the mean.
        """
        diagonal = self.hessian.diagonal()
        live = diagonal > 0
        mean = diagonal[live].mean() if live.any() else torch.ones_like(diagonal[0])
        pull = torch.where(live, damping * mean, (1 + damping) * mean)
        hessian = self.hessian.clone()
        hessian.diagonal().add_(pull)
        goal = torch.addcmul(self.goal, matrix.to(pull.dtype), pull)
        return OutputError(hessian, goal, self.energy + (matrix.square() * pull).sum(1))


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
