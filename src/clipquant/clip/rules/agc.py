"""The rule that limits each unit of a gradient relative to its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from clipquant.clip.checks import check_number
from clipquant.clip.gradients import Gradients
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.rule import Rule, State
from clipquant.clip.unitwise import UnitLimits, scale_units_, unit_norms


@dataclass(frozen=True)
class ScaleUnits(Plan):
    """Scale each unit of a gradient down to `ratio` times the norm of the weight's unit, that being at least `eps`."""

    ratio: float
    eps: float

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        limits = UnitLimits(self.ratio, self.eps)
        return grad * limits.coefficients(unit_norms(grad), unit_norms(param)).to(grad.dtype)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        limits = UnitLimits(self.ratio, self.eps)
        outcome = scale_units_(grads.tensors, params, limits, measure=order is not None)
        return outcome.on_all_processes(grads, order)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Tensor:
        return grads.unmeasured().norms(order)


@dataclass(frozen=True)
class AGC(Rule):
    """Scale each unit of a gradient down to at most `ratio` times the norm of the same unit of the weight.

    A unit is one output channel (first axis) of a tensor with two or more axes, the whole tensor otherwise. The
    weight's norm counts as at least `eps`, so that zero-initialised weights still learn.

    Args:
        ratio: Largest norm of a gradient's unit relative to the weight's, > 0.
        eps: Smallest norm of a weight's unit, > 0.

    Raises:
        ValueError: A value is not positive.

    Source: adaptive gradient clipping, Brock et al., arXiv 2102.06171, equation 3.

    Example:
        >>> import torch
        >>> weight, grad = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> AGC(0.1).clip(grad, weight, ScaleUnits(0.1, 1e-3))
        tensor([[0.0600, 0.0800]])
    """

    ratio: float = 0.01
    eps: float = 1e-3
    local = True

    def __post_init__(self) -> None:
        check_number("AGC", "ratio", self.ratio, above=0.0, hint="e.g. 0.01")
        check_number(
            "AGC",
            "eps",
            self.eps,
            above=0.0,
            hint="e.g. 1e-3: with 0 a zero weight would never learn",
        )

    def init(self) -> State:
        return {}

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[ScaleUnits, State]:
        return ScaleUnits(float(self.ratio), float(self.eps)), state

    def clip(self, grad: Tensor, param: Tensor, plan: ScaleUnits) -> Tensor:
        return plan.clip(grad, param)
