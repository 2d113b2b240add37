"""The rule that limits to a percentile of the norms so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number
from clipquant.clip.gradients import Gradients
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import Scale, shrinkage
from clipquant.errors import ArgumentError


@dataclass(frozen=True)
class AutoClip(Rule):
    """Scale all gradients so that their norm is at most a percentile of the norms seen so far, this step's included.

    A norm of zero tells nothing about the scale of the gradients (a loss weight of zero, a masked batch) and is left
    out of the history, as is one that is not finite.

    Args:
        percentile: Percentile of the history that is the limit, in (0, 100].
        window: Number of latest norms that the history keeps, >= 1.

    Raises:
        ValueError: A value is out of range.

    Source: Seetharaman et al., arXiv 2007.14469; the window is an addition that bounds the history, and the
    paper's history takes zeros too.

    Example:
        >>> rule = AutoClip(percentile=50)
        >>> _, state = rule.plan(Gradients([torch.tensor([1.0])]), [], rule.init())
        >>> plan, _ = rule.plan(Gradients([torch.tensor([3.0])]), [], state)
        >>> plan.coefficient  # the median of 1 and 3 is 2
        tensor(0.6667)
    """

    percentile: float = 10.0
    window: int = 1000
    folds = True

    def __post_init__(self) -> None:
        check_number("AutoClip", "percentile", self.percentile, above=0.0, hint="e.g. 10")
        if self.percentile > 100:
            raise ArgumentError(
                f"AutoClip: percentile must be at most 100, got {self.percentile!r}: e.g. 10"
            )
        check_count("AutoClip", "window", self.window, low=1)

    def init(self) -> State:
        return {"history": torch.zeros(0, device="cpu")}

    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Scale, State]:
        norm = grads.norm()
        if not norm.isfinite() or not norm > 0:
            return Scale(torch.ones_like(norm)), state
        history = torch.cat([state["history"].to(norm), norm.reshape(1)])[-self.window :]
        limit = torch.quantile(history, self.percentile / 100)
        return Scale(shrinkage(norm, limit)), {"history": history}

    def clip(self, grad: Tensor, param: Tensor, plan: Scale) -> Tensor:
        return plan.clip(grad, param)
