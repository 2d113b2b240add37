"""Carrying out a plan: the fast in-place form of each rule's `clip`, equal to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from clipquant.clip.norms import Gradients, local_values
from clipquant.clip.plans import Clamp, Scale, ScaleEach
from clipquant.clip.rules import Rule


def carry_out_(rule: Rule, plan: Any, grads: Gradients, params: Sequence[Tensor]) -> bool:
    """Write the clipped gradients over `grads`; a plan that changes nothing writes nothing.

    Args:
        rule: The rule that made the plan.
        plan: What it decided.
        grads: The gradients, changed in place.
        params: Their parameters, in the same order.

    Returns:
        Whether any gradient was changed.
    """
    if isinstance(plan, Clamp):
        return _clamp_(grads, plan)
    if isinstance(plan, Scale):
        return _scale_(grads, plan)
    if isinstance(plan, ScaleEach):
        return _scale_each_(grads, params, plan)
    return _map_(rule, plan, grads, params)


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
    """Return `grad`, or an equal gradient whose stored values determine it alone, so that they can be clipped in place.

    Duplicate entries of a sparse gradient are summed, lazily conjugated values are written out, and the partial sums
    of a distributed gradient are added up.

    Args:
        grad: A gradient of any kind.

    Returns:
        `grad` itself in the common case.
    """
    if grad.layout is torch.sparse_coo:
        return grad.coalesce()
    if isinstance(grad, DTensor) and any(
        isinstance(placement, Partial) for placement in grad.placements
    ):
        return grad.redistribute(
            placements=[Replicate() if isinstance(p, Partial) else p for p in grad.placements]
        )
    return grad.resolve_conj() if grad.is_complex() else grad


def _clamp_(grads: Gradients, plan: Clamp) -> bool:
    clipped = False
    for grad in grads:
        values = local_values(grad)
        values = torch.view_as_real(values) if values.is_complex() else values
        if values.numel() and _exceeds(values, plan.limit):
            values.clamp_(-plan.limit, plan.limit)
            clipped = True
    return clipped


def _exceeds(values: Tensor, limit: float) -> bool:
    low, high = torch.aminmax(values)
    return not (low.item() >= -limit and high.item() <= limit)


def _scale_(grads: Gradients, plan: Scale) -> bool:
    coefficient = float(plan.coefficient)
    if coefficient == 1.0:
        return False
    torch._foreach_mul_([local_values(grad) for grad in grads], coefficient)
    return True


def _scale_each_(grads: Gradients, params: Sequence[Tensor], plan: ScaleEach) -> bool:
    coefficients = [plan.coefficients[id(param)] for param in params]
    clipped = [i for i, coefficient in enumerate(coefficients) if coefficient != 1.0]
    if clipped:
        torch._foreach_mul_(
            [local_values(grads[i]) for i in clipped], [coefficients[i] for i in clipped]
        )
    return bool(clipped)


def _map_(rule: Rule, plan: Any, grads: Gradients, params: Sequence[Tensor]) -> bool:
    clipped = False
    for grad, param in zip(grads, params, strict=True):
        result = rule.clip(grad, param, plan)
        if result is not grad:
            clipped = clipped or not torch.equal(result, grad)
            grad.copy_(result)
    return clipped
