"""Carrying out a plan: the fast in-place form of each rule's `clip`, equal to it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from clipquant.clip.norms import Gradients, local_values, reduce_any, unit_norms
from clipquant.clip.plans import Clamp, Indicate, Scale, ScaleEach, ScaleUnits
from clipquant.clip.rules import Rule, unit_coefficients

_SMALL = (
    1 << 12
)  # elements; below, a call costs more than the copy that lets one call serve many tensors


@dataclass(frozen=True)
class Outcome:
    """What carrying out a plan came to.

    Args:
        clipped: Whether any gradient was changed.
        finite: False where a gradient was found not to be finite, and left as it was.
    """

    clipped: bool
    finite: bool = True


def carry_out_(
    rule: Rule, plan: Any, grads: Gradients, params: Sequence[Tensor], watch: bool = True
) -> Outcome:
    """Write the clipped gradients over `grads`; a plan that changes nothing writes nothing.

    Args:
        rule: The rule that made the plan.
        plan: What it decided.
        grads: The gradients, changed in place.
        params: Their parameters, in the same order.
        watch: Whether the outcome matters. Without, a clamp is one pass and counts as having clipped.

    Returns:
        The outcome on all processes that share the gradients.
    """
    if isinstance(plan, Scale):
        return _scale_(grads, plan)
    if isinstance(plan, ScaleEach):
        return _scale_each_(grads, params, plan)
    if isinstance(plan, Clamp):
        outcome = _clamp_(grads, plan) if watch else _clamp_unwatched_(grads, plan)
    elif isinstance(plan, ScaleUnits):
        outcome = _scale_units_(grads, params, plan)
    elif isinstance(plan, Indicate):
        outcome = _indicate_(grads, plan)
    else:
        outcome = _map_(rule, plan, grads, params)
    clipped, broken = reduce_any([outcome.clipped, not outcome.finite], grads)
    return Outcome(clipped, not broken)


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


def _clamp_unwatched_(grads: Gradients, plan: Clamp) -> Outcome:
    low, high = -plan.limit, plan.limit
    for values in _reals(grads):
        values.clamp_(low, high)
    return Outcome(clipped=True)


def _clamp_(grads: Gradients, plan: Clamp) -> Outcome:
    reals = [values for values in _reals(grads) if values.numel()]
    small = [v for v in reals if v.numel() <= _SMALL and v.dtype is torch.float32]
    outcome = _clamp_small_(small, plan.limit) if len(small) > 1 else Outcome(False)
    clipped, finite = outcome.clipped, outcome.finite
    for values in (
        reals
        if len(small) <= 1
        else [v for v in reals if v.numel() > _SMALL or v.dtype is not torch.float32]
    ):
        largest = _largest(values)
        if not math.isfinite(largest):
            finite = False
        elif largest > plan.limit:
            values.clamp_(-plan.limit, plan.limit)
            clipped = True
    return Outcome(clipped, finite)


def _clamp_small_(reals: list[Tensor], limit: float) -> Outcome:
    largest = _largest(torch.cat([values.reshape(-1) for values in reals]))
    if not math.isfinite(largest):
        return Outcome(clipped=False, finite=False)
    if largest > limit:
        torch._foreach_clamp_min_(reals, -limit)
        torch._foreach_clamp_max_(reals, limit)
    return Outcome(clipped=largest > limit)


def _largest(values: Tensor) -> float:
    low, high = torch.aminmax(values)
    # Through NaN the comparison fails, which gives NaN back.
    return max(-low.item(), high.item()) if low.item() <= high.item() else math.nan


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


def _scale_units_(grads: Gradients, params: Sequence[Tensor], plan: ScaleUnits) -> Outcome:
    clipped = False
    for grad, param in zip(grads, params, strict=True):
        if grad.layout is torch.sparse_coo:
            values, coefficients = _sparse_units(grad, param, plan)
        else:
            values = local_values(grad)
            coefficients = unit_coefficients(unit_norms(grad), unit_norms(param.detach()), plan)
        if values.numel() and bool((coefficients < 1).any()):
            values.mul_(coefficients.to(values.dtype))
            clipped = True
    return Outcome(clipped)


def _sparse_units(grad: Tensor, param: Tensor, plan: ScaleUnits) -> tuple[Tensor, Tensor]:
    """Return the stored values of a sparse gradient and the coefficient of each: only rows that it holds are read."""
    values = grad.values()
    rows, entry = grad.indices()[0].unique(return_inverse=True)
    squares = (
        values.abs().float().flatten(1).square().sum(1)
        if values.ndim > 1
        else values.abs().float().square()
    )
    if grad.ndim == 1:
        return values, unit_coefficients(squares.sum().sqrt(), unit_norms(param.detach()), plan)
    norms = squares.new_zeros(len(rows)).index_add_(0, entry, squares).sqrt()
    weights = unit_norms(param.detach().index_select(0, rows)).reshape(-1)
    coefficients = unit_coefficients(norms, weights, plan)[entry]
    return values, coefficients.reshape(-1, *[1] * (values.ndim - 1))


def _indicate_(grads: Gradients, plan: Indicate) -> Outcome:
    clipped = False
    for grad in grads:
        values = local_values(grad)
        ones = ~(values.abs() <= plan.threshold)
        clipped = clipped or bool((values != ones).any())
        values.copy_(ones)
    return Outcome(clipped)


def _map_(rule: Rule, plan: Any, grads: Gradients, params: Sequence[Tensor]) -> Outcome:
    clipped = False
    for grad, param in zip(grads, params, strict=True):
        result = rule.clip(grad, param, plan)
        if result is not grad:
            clipped = clipped or not torch.equal(result, grad)
            grad.copy_(result)
    return Outcome(clipped)


def _reals(grads: Gradients) -> list[Tensor]:
    """Return the stored values, complex ones as pairs of reals."""
    values = [local_values(grad) for grad in grads]
    return [torch.view_as_real(v) if v.is_complex() else v for v in values]
