"""Rules without memory: what they decide depends on the gradients of one step, or on the number of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from clipquant.clip.checks import check_count, check_number
from clipquant.clip.gradients import Gradients
from clipquant.clip.norms import norms_by_group
from clipquant.clip.plans import Clamp, Indicate, Scale, ScaleEach, ScaleUnits, scale_each, scaled
from clipquant.clip.unitwise import unit_coefficients, unit_norms

State = dict[str, Tensor]


class Rule(ABC):
    """What clips: three pure methods, none of which changes a gradient.

    A rule of your own needs no base class: a class with the three methods counts as a subclass. One that has this base
    is found by its short name in a YAML file, once it is imported. `clip_gradients_` asks `plan` once for all
    gradients, then asks `clip` for each gradient and writes what it returns. Two attributes are optional:
    `local = True` says that `plan` reads no gradient, `folds = True` that every plan is a `Scale`.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:  # a bool or NotImplemented
        methods = (getattr(other, name, None) for name in ("init", "plan", "clip"))
        if cls is Rule and all(map(callable, methods)):
            return True
        return NotImplemented

    @abstractmethod
    def init(self) -> State:
        """Return the state before the first step; empty for a rule without memory."""
        ...

    @abstractmethod
    def plan(self, grads: Gradients, params: Sequence[Tensor], state: State) -> tuple[Any, State]:
        """Decide from all gradients; return the plan and the next state."""
        ...

    @abstractmethod
    def clip(self, grad: Tensor, param: Tensor, plan: Any) -> Tensor:
        """Return the clipped gradient of one parameter."""
        ...


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
        if grad.is_complex():
            return torch.view_as_complex(torch.view_as_real(grad).clamp(-plan.limit, plan.limit))
        return grad.clamp(-plan.limit, plan.limit)


@dataclass(frozen=True)
class Norm(Rule):
    """Scale gradients down so that their norm is at most `max_norm`; directions stay, nothing is scaled up.

    Args:
        max_norm: Largest norm, >= 0.
        norm_type: Order p >= 1 of the norm; `math.inf` or "inf" for the largest magnitude.
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
            "Norm", "norm_type", order, low=1.0, hint='the order of the norm, e.g. 2 or "inf"'
        )
        if self.scope not in ("global", "group", "tensor"):
            raise ValueError(
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
        return {"steps": torch.zeros((), dtype=torch.int64)} if self.warmup_steps else {}

    def plan(
        self, grads: Gradients, params: Sequence[Tensor], state: State
    ) -> tuple[Scale | ScaleEach, State]:
        limit, state = self._limit(state)
        if self.scope == "global":
            return Scale(norm_coefficient(grads.norm(self.order), limit)), state
        norms = grads.norms(self.order)
        if self.scope == "group":
            index = sorted(set(grads.groups))
            totals = norms_by_group(norms, grads.groups, self.order)
            norms = totals[[index.index(group) for group in grads.groups]]
        return scale_each(norm_coefficient(norms, limit), params), state

    def clip(self, grad: Tensor, param: Tensor, plan: Scale | ScaleEach) -> Tensor:
        return scaled(grad, param, plan)

    def _limit(self, state: State) -> tuple[float, State]:
        if not self.warmup_steps:
            return float(self.max_norm), state
        steps = state["steps"] + 1
        share = min(1.0, int(steps) / self.warmup_steps)
        return self.warmup_start + share * (self.max_norm - self.warmup_start), {
            **state,
            "steps": steps,
        }


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
        return grad * unit_coefficients(unit_norms(grad), unit_norms(param), plan).to(grad.dtype)


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
        # "Not within" rather than "beyond", so that NaN is a non-zero element, as the definition has it.
        return (~(grad.abs() <= plan.threshold)).to(grad.dtype)


def norm_coefficient(norm: Tensor, limit: float | Tensor) -> Tensor:
    """Return `min(1, limit / (norm + 1e-6))`, the factor that brings a norm down to `limit`.

    Args:
        norm: Norms, any shape.
        limit: Largest norm.

    Returns:
        Factors in [0, 1] of the shape of `norm`; NaN where the norm is.

    Example:
        >>> norm_coefficient(torch.tensor([0.5, 4.0]), 1.0)
        tensor([1.0000, 0.2500])
    """
    return (limit / (norm + 1e-6)).clamp(max=1.0)
