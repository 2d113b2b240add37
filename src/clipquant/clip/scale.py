"""Plans that multiply: one coefficient for all gradients, or one for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.shards import local_values


@dataclass(frozen=True)
class Scale(Plan):
    """Multiply every gradient by one coefficient, a number or scalar tensor in [0, 1]: it does not amplify."""

    coefficient: Tensor | float

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        return grad * float(self.coefficient)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        coefficient = float(self.coefficient)
        if coefficient == 1.0:
            return Outcome(clipped=False)
        tensors = grads.tensors if grads.small else [local_values(grad) for grad in grads]
        torch._foreach_mul_(tensors, coefficient)
        return Outcome(clipped=True)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        return grads.measured(order).scaled(float(self.coefficient))


@dataclass(frozen=True)
class ScaleEach(Plan):
    """Multiply each gradient by a coefficient of its own, a float in [0, 1], found by the `id` of its parameter."""

    coefficients: Mapping[int, float]

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        return grad * self.coefficients[id(param)]

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        coefficients = [self.coefficients[id(param)] for param in params]
        clipped = [i for i, coefficient in enumerate(coefficients) if coefficient != 1.0]
        if clipped:
            values = [local_values(grads[i]) for i in clipped]
            torch._foreach_mul_(values, [coefficients[i] for i in clipped])
        return Outcome(bool(clipped))

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        before = grads.norms(order)
        own = before.new_tensor([self.coefficients[id(param)] for param in params])
        return Measured(before * own, order)


def scale_each(coefficients: Sequence[float], params: Sequence[Tensor]) -> ScaleEach:
    """Return the plan that gives each parameter's gradient its coefficient, in the order of `params`."""
    return ScaleEach(dict(zip(map(id, params), coefficients, strict=True)))


def norm_coefficient(norm: float, limit: float) -> float:
    """Return `min(1, limit / (norm + 1e-6))`, the factor that brings a norm down to `limit`.

    Args:
        norm: A norm.
        limit: Largest norm; an infinite one changes nothing.

    Returns:
        A factor in [0, 1]; NaN where the norm is.

    Example:
        >>> norm_coefficient(0.5, 1.0), round(norm_coefficient(4.0, 1.0), 6)
        (1.0, 0.25)
    """
    if limit == math.inf:
        return 1.0
    coefficient = limit / (norm + 1e-6)
    return min(coefficient, 1.0)


def shrinkage(norm: Tensor, limit: float | Tensor) -> Tensor:
    """Return the factor that brings a norm down to `limit`, exactly 1 where it is within.

    Args:
        norm: Norms, any shape.
        limit: Largest norms.

    Returns:
        `min(1, limit / norm)`, same shape.

    Example:
        >>> shrinkage(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    return torch.where(norm > limit, limit / norm, torch.ones_like(norm))
