"""Plans that multiply: one coefficient for all gradients, or one for each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.shards import local_values


@dataclass(frozen=True)
class Scale(Plan):
    """Multiply every gradient by one coefficient, a scalar tensor in [0, 1] that does not amplify."""

    coefficient: Tensor

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
        torch._foreach_mul_([local_values(grad) for grad in grads], coefficient)
        return Outcome(clipped=True)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Tensor:
        return grads.norms(order) * self.coefficient


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

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Tensor:
        before = grads.norms(order)
        return before * before.new_tensor([self.coefficients[id(param)] for param in params])


def scale_each(coefficients: Tensor, params: Sequence[Tensor]) -> ScaleEach:
    """Return the plan that gives each parameter's gradient its coefficient, in the order of `params`."""
    return ScaleEach(dict(zip(map(id, params), coefficients.tolist(), strict=True)))


def norm_coefficient(norm: Tensor, limit: float) -> Tensor:
    """Return `min(1, limit / (norm + 1e-6))`, the factor that brings a norm down to `limit`.

    Args:
        norm: Norms, any shape.
        limit: Largest norm.

    Returns:
        Factors in [0, 1] of the shape of `norm`; NaN where the norm is. All 1 for an infinite limit.

    Example:
        >>> norm_coefficient(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    if limit == math.inf:
        return torch.ones_like(norm)
    return (limit / (norm + 1e-6)).clamp(max=1.0)


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
