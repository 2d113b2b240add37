"""The rule that clamps every element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_number
from clipquant.clip.elementwise import clamp_
from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.rule import Rule, State


@dataclass(frozen=True)
class Clamp(Plan):
    """Clamp every element to [-limit, limit]."""

    limit: float

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        if grad.is_complex():
            return torch.view_as_complex(torch.view_as_real(grad).clamp(-self.limit, self.limit))
        return grad.clamp(-self.limit, self.limit)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        if grads.small:
            return self._write_small_(grads, leave, tell or order is not None, order)
        outcome = clamp_(grads.tensors, self.limit, leave, tell, order, grads.later)
        return outcome.on_all_processes(grads, order)

    def _write_small_(
        self, grads: Gradients, leave: bool, tell: bool, order: float | None
    ) -> Outcome:
        """Look at all gradients at once; their norms are left to whoever reads them."""
        joined = grads.joined if tell or leave else None
        if joined is not None:
            low, high = (extreme.item() for extreme in torch.aminmax(joined))
            before = None if order is None else grads.measured(order)
            if leave and not (low > -math.inf and high < math.inf):
                return Outcome(False, False, before, before)
            if -self.limit <= low and high <= self.limit:
                return Outcome(False, True, before, before)
            after = None if before is None else before.limited(self.limit / grads.loss_scale)
        else:
            before = after = None
        torch._foreach_clamp_min_(grads.tensors, -self.limit)
        torch._foreach_clamp_max_(grads.tensors, self.limit)
        return Outcome(True, True, before, after)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        return grads.unmeasured().measured(order)


@dataclass(frozen=True)
class Value(Rule):
    """Clamp every element of every gradient to [-limit, limit]; elements within are untouched bit for bit.

    Real and imaginary parts of a complex gradient are clamped separately.

    Args:
        limit: Largest magnitude of an element, >= 0.

    Raises:
        ValueError: `limit` is negative, NaN or no number.

    Source: `g <- clamp(g, -c, c)`; Mikolov, "Statistical language models based on neural networks" (2012), ch. 3.2.2.

    Example:
        >>> Value(1.0).clip(torch.tensor([-3.0, 0.5]), torch.zeros(2), Clamp(1.0))
        tensor([-1.0000,  0.5000])
    """

    limit: float
    local = True

    def __post_init__(self) -> None:
        check_number(
            "Value", "limit", self.limit, low=0.0, hint="the largest magnitude an element may have"
        )

    def init(self) -> State:
        return {}

    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Clamp, State]:
        return Clamp(float(self.limit)), state

    def clip(self, grad: Tensor, param: Tensor, plan: Clamp) -> Tensor:
        return plan.clip(grad, param)
