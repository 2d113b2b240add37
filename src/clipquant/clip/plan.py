"""Plans: what a rule decided to do to the gradients of one step, and how it is done."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.norms import value_norms
from clipquant.clip.outcome import Outcome
from clipquant.clip.rule import Rule
from clipquant.clip.shards import local_values
from clipquant.errors import ArgumentError


class Plan(ABC):
    """What a rule decided, before anything is changed; it carries itself out."""

    @abstractmethod
    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        """Return the clipped gradient of one parameter."""
        ...

    @abstractmethod
    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        """Write over all gradients what `clip` returns for each; a plan that changes nothing writes nothing.

        Args:
            grads: The gradients, changed in place.
            params: Their parameters, in the same order.
            leave: Gradients that are not finite need not be clipped, for the step is left out then; say whether all
                are.
            tell: Whether the outcome matters. Without, a clamp is one pass and counts as having clipped.
            order: Order of the norms to measure on the way; None for none.

        Returns:
            The outcome on all processes that share the gradients.
        """
        ...

    @abstractmethod
    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        """Return the norms after `write_`: by arithmetic where the plan allows it, else measured.

        Args:
            grads: The gradients, whose norms from before are known.
            params: Their parameters.
            order: Order of the norm.
        """
        ...


@dataclass(frozen=True)
class Mapped(Plan):
    """The plan of a rule that only says what becomes of one gradient.

    Args:
        rule: The rule.
        decision: What its `plan` returned, for its `clip` to read.
    """

    rule: Rule
    decision: Any

    def clip(self, grad: Tensor, param: Tensor) -> Tensor:
        return self.rule.clip(grad, param, self.decision)

    def write_(
        self,
        grads: Gradients,
        params: Sequence[Tensor],
        *,
        leave: bool = False,
        tell: bool = True,
        order: float | None = None,
    ) -> Outcome:
        before = _local_norms(grads, order) if leave or order is not None else None
        finite = before is None or all(map(math.isfinite, before.each.tolist()))
        if leave and not finite:
            return Outcome(False, False, before, before).on_all_processes(grads, order)
        results = [self._result(grad, param) for grad, param in zip(grads, params, strict=True)]
        clipped = False
        for grad, result in zip(grads, results, strict=True):
            if result is not grad:
                clipped = clipped or not torch.equal(local_values(result), local_values(grad))
                grad.copy_(result)
        after = _local_norms(grads, order) if clipped and before is not None else before
        return Outcome(clipped, True, before, after).on_all_processes(grads, order)

    def norms_after(self, grads: Gradients, params: Sequence[Tensor], order: float) -> Measured:
        return grads.unmeasured().measured(order)

    def _result(self, grad: Tensor, param: Tensor) -> Tensor:
        result = self.clip(grad, param)
        if not isinstance(result, Tensor) or result.shape != grad.shape:
            given = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ArgumentError(
                f"{type(self.rule).__name__}.clip must return a tensor of the gradient's shape {tuple(grad.shape)}, "
                f"got {given}; no gradient was changed"
            )
        return result


def plan_of(rule: Rule, decision: Any) -> Plan:
    """Return what a rule's `plan` decided as a plan that carries itself out."""
    return decision if isinstance(decision, Plan) else Mapped(rule, decision)


def _local_norms(grads: Gradients, order: float | None) -> Measured:
    order = order or 2.0
    return Measured(value_norms([local_values(grad) for grad in grads], order), order)
