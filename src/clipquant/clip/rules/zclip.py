"""The rule that brings down norms that stand out from their moving mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number, check_share
from clipquant.clip.gradients import Gradients
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import Scale, shrinkage


@dataclass(frozen=True)
class ZClip(Rule):
    """Scale all gradients down when their norm stands out from its moving mean by more than `z` standard deviations.

    A norm at `s > z` deviations is brought down to `z * z / s` deviations above the mean. The statistics follow the
    norms after this. The first `warmup` norms only start the statistics. A norm of zero tells nothing about
    the scale of the gradients (a loss weight of zero, a masked batch) and enters nothing, as one that is not finite.

    Args:
        z: Deviations from the mean beyond which a norm is a spike, > 0.
        decay: Share of the moving mean and variance that stays from step to step, in [0, 1).
        warmup: Steps whose norms give the first mean and variance, >= 1.
        max_norm: Largest norm at any time; None for no limit.

    Raises:
        ValueError: A value is out of range.

    Source: Kumar et al., arXiv 2504.02507, whose statistics take zeros too.

    Example:
        >>> ZClip().init()["steps"]
        tensor(0)
    """

    z: float = 2.5
    decay: float = 0.97
    warmup: int = 25
    max_norm: float | None = 1.0
    folds = True

    def __post_init__(self) -> None:
        check_number("ZClip", "z", self.z, above=0.0, hint="standard deviations, e.g. 2.5")
        check_share("ZClip", "decay", self.decay)
        check_count("ZClip", "warmup", self.warmup, low=1)
        if self.max_norm is not None:
            check_number("ZClip", "max_norm", self.max_norm, above=0.0, hint="None for no limit")

    def init(self) -> State:
        zero = torch.zeros((), dtype=torch.float64, device="cpu")
        return {
            "steps": torch.zeros((), dtype=torch.int64, device="cpu"),
            "warmup": zero[None][:0],
            "mean": zero,
            "variance": zero,
        }

    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Scale, State]:
        norm = grads.norm().double()
        if not norm.isfinite() or not norm > 0:
            return Scale(torch.ones_like(norm)), state
        state = {key: value.to(norm.device) for key, value in state.items()}
        warming = int(state["steps"]) < self.warmup
        target = norm if warming else self._target(norm, state)
        following = self._warm(norm, state) if warming else self._follow(target, state)
        if self.max_norm is not None:
            target = target.clamp(max=self.max_norm)
        return Scale(shrinkage(norm, target)), {**following, "steps": state["steps"] + 1}

    def clip(self, grad: Tensor, param: Tensor, plan: Scale) -> Tensor:
        return plan.clip(grad, param)

    def _target(self, norm: Tensor, state: State) -> Tensor:
        """Return the norm that a spike is brought down to; any other norm as it is."""
        deviation = state["variance"].sqrt()
        score = (norm - state["mean"]) / (deviation + 1e-6)
        return state["mean"] + self.z**2 / score * deviation if score > self.z else norm

    def _warm(self, norm: Tensor, state: State) -> State:
        norms = torch.cat([state["warmup"], norm.reshape(1)])
        if len(norms) < self.warmup:
            return {**state, "warmup": norms}
        return {
            **state,
            "warmup": norms[:0],
            "mean": norms.mean(),
            "variance": norms.var(correction=0),
        }

    def _follow(self, target: Tensor, state: State) -> State:
        mean = self.decay * state["mean"] + (1 - self.decay) * target
        variance = self.decay * state["variance"] + (1 - self.decay) * (target - mean) ** 2
        return {**state, "mean": mean, "variance": variance}
