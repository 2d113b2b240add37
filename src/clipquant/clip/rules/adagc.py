"""The rule that limits each gradient by the moving mean of its own norms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number, check_share
from clipquant.clip.gradients import Gradients
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import ScaleEach, scale_each, shrinkage


@dataclass(frozen=True)
class AdaGC(Rule):
    """Scale each gradient so that its norm is at most `ratio` times the moving mean of its own clipped norms.

    During warm-up all gradients together are limited to `max_norm`, and each mean starts as the smallest norm seen. A
    gradient of zero tells nothing about its scale and leaves its mean as it is.

    Args:
        ratio: Largest norm relative to the moving mean, > 0.
        decay: Share of the moving mean that stays from step to step, in [0, 1).
        warmup: Steps of warm-up, >= 1.
        max_norm: Largest norm of all gradients during warm-up, > 0.

    Raises:
        ValueError: A value is out of range.

    Source: Wang et al., arXiv 2502.11034, algorithm 1.

    Example:
        >>> rule = AdaGC(warmup=1)
        >>> weight = torch.zeros(1)
        >>> _, state = rule.plan(Gradients([torch.tensor([0.5])]), [weight], rule.init())
        >>> plan, _ = rule.plan(Gradients([torch.tensor([5.0])]), [weight], state)
        >>> rule.clip(torch.tensor([5.0]), weight, plan)  # 1.05 * 0.5
        tensor([0.5250])
    """

    ratio: float = 1.05
    decay: float = 0.98
    warmup: int = 100
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check_number("AdaGC", "ratio", self.ratio, above=0.0, hint="e.g. 1.05")
        check_share("AdaGC", "decay", self.decay)
        check_count("AdaGC", "warmup", self.warmup, low=1)
        check_number("AdaGC", "max_norm", self.max_norm, above=0.0, hint="e.g. 1.0")

    def init(self) -> State:
        return {
            "steps": torch.zeros((), dtype=torch.int64, device="cpu"),
            "means": torch.zeros(0, dtype=torch.float64, device="cpu"),
        }

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[ScaleEach, State]:
        norms = grads.norms().double()
        means = _grown(state["means"].to(norms.device), max(grads.positions, default=-1) + 1)
        own = means[list(grads.positions)]
        warming = int(state["steps"]) < self.warmup
        if warming:
            coefficients = shrinkage(grads.norm().double(), self.max_norm).expand_as(norms)
        else:
            coefficients = shrinkage(norms, torch.where(own.isinf(), norms, self.ratio * own))
        clipped = norms * coefficients
        following = (
            torch.minimum(own, clipped)
            if warming
            else self.decay * own + (1 - self.decay) * clipped
        )
        following = torch.where(
            own.isinf(), clipped, following
        )  # a gradient seen for the first time
        telling = clipped.isfinite() & (norms > 0) & grads.norm().isfinite()
        means[list(grads.positions)] = torch.where(telling, following, own)
        coefficients = torch.where(telling, coefficients, torch.ones_like(norms))
        return scale_each(coefficients.tolist(), params), {
            "steps": state["steps"] + int(telling.any()),
            "means": means,
        }

    def clip(self, grad: Tensor, param: Tensor, plan: ScaleEach) -> Tensor:
        return plan.clip(grad, param)


def _grown(means: Tensor, count: int) -> Tensor:
    """Return a copy with at least `count` entries; infinity stands for a gradient never seen."""
    missing = max(0, count - len(means))
    return torch.cat([means, means.new_full((missing,), math.inf)])
