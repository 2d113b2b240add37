"""The rule that makes every gradient a vector of zeros and ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from clipquant.clip.checks import check_number
from clipquant.clip.elementwise import indicate_
from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.outcome import Outcome
from clipquant.clip.plan import Plan
from clipquant.clip.rule import Rule, State


@dataclass(frozen=True)
class Indicate(Plan):
    """Replace every element by 1 where its magnitude exceeds `threshold`, else by 0."""

    threshold: float

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        # "Not within" rather than "beyond", so that NaN is a non-zero element, as the definition has it.
        return (~(grad.abs() <= self.threshold)).to(grad.dtype)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        outcome = indicate_(grads.tensors, self.threshold, leave, order)
        outcome = outcome.on_all_processes(grads, order)
        return replace(outcome, nonzero_share=share_of_ones(grads) if outcome.finite else None)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        return grads.unmeasured().measured(order)


def share_of_ones(grads: Gradients) -> float:
    """Return the share of ones in gradients of zeros and ones: their 1-norm is the number of ones."""
    total = sum(grad.numel() for grad in grads)
    ones = Gradients(grads.tensors).norms(1.0).double().sum()
    return round(float(ones)) / total if total else 0.0


@dataclass(frozen=True)
class Indicator(Rule):
    """Replace every gradient element by 1 where its magnitude exceeds `threshold`, else by 0.

    Signs are lost: each selected weight moves down by the learning rate. Combine it with the callback's `stop_step`.

    Args:
        threshold: Elements of at most this magnitude count as zero, >= 0. A larger one makes updates sparser.

    Raises:
        ValueError: `threshold` is negative, NaN or no number.

    Source: `g <- 1 if |g| > threshold else 0`.

    Example:
        >>> import torch
        >>> Indicator(0.1).clip(torch.tensor([-3.0, 0.1, 0.0]), torch.zeros(3), Indicate(0.1))
        tensor([1., 0., 0.])
    """

    threshold: float = 0.0
    local = True

    def __post_init__(self) -> None:
        check_number(
            "Indicator",
            "threshold",
            self.threshold,
            low=0.0,
            hint="0 selects every non-zero element",
        )

    def init(self) -> State:
        return {}

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[Indicate, State]:
        return Indicate(float(self.threshold)), state

    def clip(self, grad: Tensor, param: Tensor, plan: Indicate) -> Tensor:
        return plan.clip(grad, param)
