"""Rules with memory: their limits follow the norms of earlier gradients, and no non-finite norm enters them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number, check_share
from clipquant.clip.gradients import Gradients
from clipquant.clip.plans import Scale, ScaleEach, scale_each, scaled
from clipquant.clip.rules import Rule, State


@dataclass(frozen=True)
class AutoClip(Rule):
    """Scale all gradients so that their norm is at most a percentile of the norms seen so far, this step's included.

    Args:
        percentile: Percentile of the history that is the limit, in (0, 100].
        window: Number of latest norms that the history keeps, >= 1.

    Raises:
        ValueError: A value is out of range.

    Source: Seetharaman et al., arXiv 2007.14469; the window is an addition that bounds the history.

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
            raise ValueError(
                f"AutoClip: percentile must be at most 100, got {self.percentile!r}: e.g. 10"
            )
        check_count("AutoClip", "window", self.window, low=1)

    def init(self) -> State:
        return {"history": torch.zeros(0)}

    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Scale, State]:
        norm = grads.norm()
        if not norm.isfinite():
            return Scale(torch.ones_like(norm)), state
        history = torch.cat([state["history"].to(norm), norm.reshape(1)])[-self.window :]
        limit = torch.quantile(history, self.percentile / 100)
        return Scale(shrinkage(norm, limit)), {"history": history}

    def clip(self, grad: Tensor, param: Tensor, plan: Scale) -> Tensor:
        return scaled(grad, param, plan)


@dataclass(frozen=True)
class ZClip(Rule):
    """Scale all gradients down when their norm stands out from its moving mean by more than `z` standard deviations.

    A norm at `s > z` deviations is brought down to `z * z / s` deviations above the mean. The statistics follow the
    norms after this. The first `warmup` norms only start the statistics.

    Args:
        z: Deviations from the mean beyond which a norm is a spike, > 0.
        decay: Share of the moving mean and variance that stays from step to step, in [0, 1).
        warmup: Steps whose norms give the first mean and variance, >= 1.
        max_norm: Largest norm at any time; None for no limit.

    Raises:
        ValueError: A value is out of range.

    Source: Kumar et al., arXiv 2504.02507.

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
        zero = torch.zeros((), dtype=torch.float64)
        return {
            "steps": torch.zeros((), dtype=torch.int64),
            "warmup": zero[None][:0],
            "mean": zero,
            "variance": zero,
        }

    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Scale, State]:
        norm = grads.norm().double()
        if not norm.isfinite():
            return Scale(torch.ones_like(norm)), state
        state = {key: value.to(norm.device) for key, value in state.items()}
        warming = int(state["steps"]) < self.warmup
        target = norm if warming else self._target(norm, state)
        following = self._warm(norm, state) if warming else self._follow(target, state)
        if self.max_norm is not None:
            target = target.clamp(max=self.max_norm)
        return Scale(shrinkage(norm, target)), {**following, "steps": state["steps"] + 1}

    def clip(self, grad: Tensor, param: Tensor, plan: Scale) -> Tensor:
        return scaled(grad, param, plan)

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
            "steps": torch.zeros((), dtype=torch.int64),
            "means": torch.zeros(0, dtype=torch.float64),
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
        return scale_each(coefficients, params), {
            "steps": state["steps"] + int(telling.any()),
            "means": means,
        }

    def clip(self, grad: Tensor, param: Tensor, plan: ScaleEach) -> Tensor:
        return scaled(grad, param, plan)


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


def _grown(means: Tensor, count: int) -> Tensor:
    """Return a copy with at least `count` entries; infinity stands for a gradient never seen."""
    missing = max(0, count - len(means))
    return torch.cat([means, means.new_full((missing,), math.inf)])
