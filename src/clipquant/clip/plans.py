"""Plans: what a rule decided to do to the gradients of one step, before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Clamp:
    """Clamp every element to [-limit, limit]."""

    limit: float


@dataclass(frozen=True)
class Scale:
    """Multiply every gradient by one coefficient, a scalar tensor in [0, 1] that does not amplify."""

    coefficient: Tensor


@dataclass(frozen=True)
class ScaleEach:
    """Multiply each gradient by a coefficient of its own, a float in [0, 1], found by the `id` of its parameter."""

    coefficients: Mapping[int, float]


@dataclass(frozen=True)
class ScaleUnits:
    """Scale each unit of a weight down to `ratio` times the norm of the weight's unit, that being at least `eps`."""

    ratio: float
    eps: float


@dataclass(frozen=True)
class Indicate:
    """Replace every element by 1 where its magnitude exceeds `threshold`, else by 0."""

    threshold: float


@dataclass(frozen=True)
class Outcome:
    """What carrying out a plan came to.

    Args:
        clipped: Whether any gradient was changed.
        finite: False where a gradient was found not to be finite, and left as it was.
        before: Norm of each gradient before, where asked for.
        after: Norm of each gradient after.
    """

    clipped: bool
    finite: bool = True
    before: Tensor | None = None
    after: Tensor | None = None


def scale_each(coefficients: Tensor, params: Sequence[Tensor]) -> ScaleEach:
    """Return the plan that gives each parameter's gradient its coefficient, in the order of `params`."""
    return ScaleEach(dict(zip(map(id, params), coefficients.tolist(), strict=True)))


def scaled(grad: Tensor, param: Tensor, plan: Scale | ScaleEach) -> Tensor:
    """Return `grad` times the plan's coefficient for `param`."""
    if isinstance(plan, Scale):
        return grad * float(plan.coefficient)
    return grad * plan.coefficients[id(param)]
