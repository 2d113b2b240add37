"""The rule that limits the norm of all gradients, of each group or of each tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number
from clipquant.clip.gradients import Gradients
from clipquant.clip.norms import norms_by_group
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import Scale, ScaleEach, norm_coefficient, scale_each
from clipquant.errors import ArgumentError


@dataclass(frozen=True)
class Norm(Rule):
    """Scale gradients down so that their norm is at most `max_norm`; directions stay, nothing is scaled up.

    Args:
        max_norm: Largest norm, >= 0; with `math.inf` nothing is ever changed, and norms are logged.
        norm_type: Order p > 0 of the norm; `math.inf` or "inf" for the largest magnitude.
        scope: What one norm covers: "global" all gradients as one vector, "group" each parameter group of the
            optimizer, "tensor" each gradient for itself.
        warmup_steps: Steps over which the limit moves linearly from `warmup_start` to `max_norm`; 0 for none.
        warmup_start: Limit before the first step, >= 0.

    Raises:
        ValueError: A value is out of range.

    Source: `g <- g * min(1, max_norm / (|g| + 1e-6))`; Pascanu et al., arXiv 1211.5063, with the guard of
    `torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> plan, _ = Norm(1.0).plan(Gradients([torch.tensor([3.0, 4.0])]), [], {})
        >>> Norm(1.0).clip(torch.tensor([3.0, 4.0]), torch.zeros(2), plan)
        tensor([0.6000, 0.8000])
    """

    max_norm: float
    norm_type: float | str = 2.0
    scope: Literal["global", "group", "tensor"] = "global"
    warmup_steps: int = 0
    warmup_start: float = 0.0

    def __post_init__(self) -> None:
        check_number(
            "Norm",
            "max_norm",
            self.max_norm,
            low=0.0,
            hint="the largest norm the gradients may have",
        )
        order = float(self.norm_type) if self.norm_type == "inf" else self.norm_type
        check_number(
            "Norm", "norm_type", order, above=0.0, hint='the order of the norm, e.g. 2 or "inf"'
        )
        if self.scope not in ("global", "group", "tensor"):
            raise ArgumentError(
                f'Norm: scope must be "global", "group" or "tensor", got {self.scope!r}'
            )
        check_count("Norm", "warmup_steps", self.warmup_steps, low=0)
        check_number(
            "Norm",
            "warmup_start",
            self.warmup_start,
            low=0.0,
            hint="the limit before the first step",
        )

    @property
    def order(self) -> float:
        """Order of the norm as a float."""
        return float(self.norm_type)

    @property
    def folds(self) -> bool:
        """Whether every plan is one coefficient for all gradients, which an optimizer can apply inside its step."""
        return self.scope == "global"

    def init(self) -> State:
        return (
            {"steps": torch.zeros((), dtype=torch.int64, device="cpu")} if self.warmup_steps else {}
        )

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[Scale | ScaleEach, State]:
        limit, state = self.limit(state)
        if self.scope == "global":
            return Scale(norm_coefficient(grads.measured(self.order).total, limit)), state
        norms = grads.norms(self.order)
        if self.scope == "group":
            index = sorted(set(grads.groups))
            totals = norms_by_group(norms, grads.groups, self.order)
            norms = totals[[index.index(group) for group in grads.groups]]
        coefficients = [norm_coefficient(norm, limit) for norm in norms.tolist()]
        return scale_each(coefficients, params), state

    def clip(self, grad: Tensor, param: Tensor, plan: Scale | ScaleEach) -> Tensor:
        return plan.clip(grad, param)

    def limit(self, state: State) -> tuple[float, State]:
        """Return the limit of this step, and the next state."""
        if not self.warmup_steps:
            return float(self.max_norm), state
        steps = state["steps"] + 1
        share = min(1.0, int(steps) / self.warmup_steps)
        return self.warmup_start + share * (self.max_norm - self.warmup_start), {
            **state,
            "steps": steps,
        }
