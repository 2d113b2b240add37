"""The rule that limits each unit of a gradient relative to its weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_number, is_count
from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.rule import Rule, State
from clipquant.clip.units import UnitLimits, unit_norms
from clipquant.clip.unitwise import scale_small_, scale_units_
from clipquant.errors import ArgumentError


@dataclass(frozen=True)
class ScaleUnits(Plan):
    """Scale each unit of a gradient down to `ratio` times the norm of the weight's unit, that being at least `eps`."""

    ratio: float
    eps: float
    axis: int = 0

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        own = (unit_norms(tensor, self.axis) for tensor in (grad, param))
        coefficients = self._limits.coefficients(*own).to(grad.dtype)
        if self.axis == 0 or grad.ndim < 2:
            return grad * coefficients
        return grad * coefficients.movedim(0, self.axis)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        if grads.small and all(p.dtype is torch.float32 and p.is_cpu for p in params):
            outcome = scale_small_(grads.tensors, params, self._limits)
            if outcome is not None:
                return outcome if order is not None else outcome.unmeasured()
        outcome = scale_units_(grads.tensors, params, self._limits, measure=order is not None)
        return outcome.on_all_processes(grads, order)

    @property
    def _limits(self) -> UnitLimits:
        return UnitLimits(self.ratio, self.eps, self.axis)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        return grads.unmeasured().measured(order)


@dataclass(frozen=True)
class AGC(Rule):
    """Scale each unit of a gradient down to at most `ratio` times the norm of the same unit of the weight.

    A unit is one slice along `axis` of a tensor with two or more axes (an output channel, for the first axis), the
    whole tensor otherwise. The weight's norm counts as at least `eps`, so that zero-initialised weights still learn.

    Args:
        ratio: Largest norm of a gradient's unit relative to the weight's, > 0.
        eps: Smallest norm of a weight's unit, > 0.
        axis: Axis of the units. A transposed convolution has its output channels along axis 1: give its parameter group
            a rule of its own.

    Raises:
        ValueError: A value is not positive, or a tensor of two or more axes has no such axis.

    Source: adaptive gradient clipping, Brock et al., arXiv 2102.06171, equation 3.

    Example:
        >>> import torch
        >>> weight, grad = torch.tensor([[1.0, 0.0]]), torch.tensor([[3.0, 4.0]])
        >>> AGC(0.1).clip(grad, weight, ScaleUnits(0.1, 1e-3))
        tensor([[0.0600, 0.0800]])
    """

    ratio: float = 0.01
    eps: float = 1e-3
    axis: int = 0
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

        if not is_count(self.axis):
            raise ArgumentError(f"AGC: axis must be a whole number, got {self.axis!r}: e.g. 0 or 1")

    def init(self) -> State:
        return {}

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[ScaleUnits, State]:
        if self.axis != 0:
            self._check_axis(grads)
        return ScaleUnits(float(self.ratio), float(self.eps), int(self.axis)), state

    def clip(self, grad: Tensor, param: Tensor, plan: ScaleUnits) -> Tensor:
        return plan.clip(grad, param)

    def _check_axis(self, grads: Gradients) -> None:
        for grad in grads:
            if grad.ndim >= 2 and not -grad.ndim <= self.axis < grad.ndim:
                raise ArgumentError(
                    f"AGC: axis={self.axis} is no axis of a gradient of shape {tuple(grad.shape)}: give those "
                    'parameters a group of their own with a rule under the key "clip"'
                )
            if grad.ndim >= 2 and grad.layout is not torch.strided:
                raise ArgumentError(
                    f"AGC: axis={self.axis} needs dense gradients, got a sparse one: its units lie along axis 0"
                )
