"""Carrying out a plan: the fast in-place form of each rule's `clip`, equal to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from clipquant.clip.elementwise import clamp_, indicate_
from clipquant.clip.gradients import Gradients
from clipquant.clip.norms import value_norms
from clipquant.clip.plans import Clamp, Indicate, Outcome, Scale, ScaleEach, ScaleUnits
from clipquant.clip.rules import Rule
from clipquant.clip.shards import local_values, reduce_any, reduce_norms
from clipquant.clip.unitwise import scale_units_


def carry_out_(
    rule: Rule,
    plan: Any,
    grads: Gradients,
    params: Sequence[Tensor],
    *,
    leave: bool = False,
    tell: bool = True,
    order: float | None = None,
) -> Outcome:
    """Write the clipped gradients over `grads`; a plan that changes nothing writes nothing.

    Args:
        rule: The rule that made the plan.
        plan: What it decided.
        grads: The gradients, changed in place.
        params: Their parameters, in the same order.
        leave: Gradients that are not finite need not be clipped, for the step is left out then; say whether all are.
        tell: Whether the outcome matters. Without, a clamp is one pass and counts as having clipped.
        order: Order of the norms to measure on the way; None for none.

    Returns:
        The outcome on all processes that share the gradients.
    """
    if isinstance(plan, Scale):
        return _scale_(grads, plan)
    if isinstance(plan, ScaleEach):
        return _scale_each_(grads, params, plan)
    if isinstance(plan, Clamp):
        outcome = clamp_(grads.tensors, plan, leave, tell, order)
    elif isinstance(plan, ScaleUnits):
        outcome = scale_units_(grads.tensors, params, plan, measure=order is not None)
    elif isinstance(plan, Indicate):
        outcome = indicate_(grads.tensors, plan, leave, order)
    else:
        outcome = _map_(rule, plan, grads, params, leave, order)
    return _on_all_processes(outcome, grads, order)


def norms_after(plan: Any, grads: Gradients, params: Sequence[Tensor], order: float) -> Tensor:
    """Return the norms after `carry_out_`: by arithmetic where the plan allows it, else measured.

    Args:
        plan: The plan that was carried out.
        grads: The gradients, whose norms from before are known.
        params: Their parameters.
        order: Order of the norm.

    Returns:
        Shape (len(grads),).
    """
    if isinstance(plan, Scale):
        return grads.norms(order) * plan.coefficient
    if isinstance(plan, ScaleEach):
        before = grads.norms(order)
        return before * before.new_tensor([plan.coefficients[id(param)] for param in params])
    return Gradients(grads.tensors, loss_scale=grads.loss_scale).norms(order)


def writable(grad: Tensor) -> Tensor:
    """Return `grad`, or an equal gradient whose stored values can be clipped in place.

    Duplicate entries of a sparse gradient are summed, lazily conjugated values are written out, and the partial sums
    of a distributed gradient are added up.

    Args:
        grad: A gradient of any kind.

    Returns:
        `grad` itself in the common case.
    """
    if grad.layout is torch.sparse_coo:
        return grad.coalesce()
    if isinstance(grad, DTensor) and any(isinstance(p, Partial) for p in grad.placements):
        return grad.redistribute(
            placements=[Replicate() if isinstance(p, Partial) else p for p in grad.placements]
        )
    return grad.resolve_conj() if grad.is_complex() else grad


def _scale_(grads: Gradients, plan: Scale) -> Outcome:
    coefficient = float(plan.coefficient)
    if coefficient == 1.0:
        return Outcome(clipped=False)
    torch._foreach_mul_([local_values(grad) for grad in grads], coefficient)
    return Outcome(clipped=True)


def _scale_each_(grads: Gradients, params: Sequence[Tensor], plan: ScaleEach) -> Outcome:
    coefficients = [plan.coefficients[id(param)] for param in params]
    clipped = [i for i, coefficient in enumerate(coefficients) if coefficient != 1.0]
    if clipped:
        values = [local_values(grads[i]) for i in clipped]
        torch._foreach_mul_(values, [coefficients[i] for i in clipped])
    return Outcome(bool(clipped))


def _map_(
    rule: Rule,
    plan: Any,
    grads: Gradients,
    params: Sequence[Tensor],
    leave: bool,
    order: float | None,
) -> Outcome:
    """Write what the rule's own `clip` returns."""
    before = _local_norms(grads, order) if leave or order is not None else None
    finite = before is None or all(map(math.isfinite, before.tolist()))
    if leave and not finite:
        return Outcome(False, False, before, before)
    clipped = False
    for grad, param in zip(grads, params, strict=True):
        result = rule.clip(grad, param, plan)
        if result is not grad:
            clipped = clipped or not torch.equal(local_values(result), local_values(grad))
            grad.copy_(result)
    after = _local_norms(grads, order) if clipped and before is not None else before
    return Outcome(clipped, True, before, after)


def _local_norms(grads: Gradients, order: float | None) -> Tensor:
    return value_norms([local_values(grad) for grad in grads], order or 2.0)


def _on_all_processes(outcome: Outcome, grads: Gradients, order: float | None) -> Outcome:
    """Return the outcome on all processes, its norms without the factor that the gradients still carry."""
    clipped, broken = reduce_any([outcome.clipped, not outcome.finite], grads)
    norms = [
        None if n is None else reduce_norms(n, grads.tensors, order or 2.0) / grads.loss_scale
        for n in (outcome.before, outcome.after)
    ]
    return Outcome(clipped, not broken, *norms)
