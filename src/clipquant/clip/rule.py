"""What a rule is: it plans for all gradients of a step, and the plan maps each of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clipquant.clip.gradients import Gradients

State = dict[str, Tensor]

METHODS = ("init", "plan", "clip")


class Rule(ABC):
    """What clips: three pure methods, none of which changes a gradient.

    A rule of your own needs no base class: a class with the three methods counts as a subclass. One that has this base
    is found by its short name in a YAML file, once it is imported. `clip_gradients_` asks `plan` once for all
    gradients; a plan that is no `Plan` is carried out by asking `clip` for each gradient and writing what it returns.
    Two attributes are optional: `local = True` says that `plan` reads no gradient, `folds = True` that every plan is a
    `Scale`.
    """

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:  # a bool or NotImplemented
        if cls is Rule and all(callable(getattr(other, name, None)) for name in METHODS):
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
