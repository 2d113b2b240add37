"""Clipping on an accelerator, where reading a value waits for the device: everything is decided there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipquant.clip.assign import Part
from clipquant.clip.job import Job
from clipquant.clip.measured import Measured
from clipquant.clip.norms import EXACT, norms_of_owners_unread
from clipquant.clip.rule import State
from clipquant.clip.rules import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip
from clipquant.clip.scale import Scale, ScaleEach
from clipquant.clip.shards import local_values, reduce_norms
from clipquant.clip.unread import UnreadRecord

_QUIET = (AGC, Indicator, Norm, Value)  # decide on the device
_ADAPTIVE = (AdaGC, AutoClip, ZClip)  # decide by norms that are read, once for all of them


def is_remote(job: Job) -> bool:
    """Return whether all gradients are on one accelerator, and every rule can do with one look at their norms."""
    grads = job.grads.tensors
    device = grads[0].device
    if device.type == "cpu":
        return False
    rules = [part.rule for part in job.assignment.parts]
    known: tuple[type, ...] = (*_QUIET, *_ADAPTIVE)
    if any(isinstance(grad, DTensor) for grad in grads):
        known = (Norm, *_ADAPTIVE)  # the others' figures would have to travel between processes
    if any(type(rule) not in known for rule in rules):
        return False
    return all(grad.device == device and grad.layout is torch.strided for grad in grads)


@dataclass(frozen=True)
class _Found:
    """What one part came to, on the device.

    Args:
        clipped: Whether anything was changed, a scalar tensor.
        factors: What the norms of its gradients were multiplied by; None where they have to be measured.
        deferred: The coefficient that is left to the caller.
        share: Share of ones.
        state: The part's next state.
    """

    clipped: Tensor
    factors: Tensor | None = None
    deferred: Tensor | None = None
    share: Tensor | None = None
    state: State | None = None


def clip_remote_(
    job: Job, measure: bool, defer: bool, skips: bool, looked: Tensor | None = None
) -> tuple[UnreadRecord, Tensor | None]:
    """Clip by each part's rule; nothing is read but the norms, once, where an adaptive rule has to know them.

    Args:
        job: Gradients for which `is_remote` holds.
        measure: Whether to measure norms after clipping that do not follow from those before.
        defer: Whether a coefficient for all gradients is left to the caller.
        skips: Whether the step is left out where a gradient is not finite.
        looked: Norms of all gradients on the CPU, where they were read before.

    Returns:
        What was done, unread; and the norms of all gradients on the CPU, where they were read.
    """
    grads, order = job.grads, job.order
    before = now = unread_norms(grads.tensors, order) / grads.loss_scale
    clipped = torch.zeros((), dtype=torch.bool, device=before.device)
    state = job.state
    found = _Found(clipped)
    seen: set[int] = set()
    parts = list(job.parts())
    for i, (part, members) in enumerate(parts):
        index, own = _index(members, now), part.state(state)
        if type(part.rule) in _ADAPTIVE:
            if looked is None or not seen.isdisjoint(members):
                looked = now.to("cpu")
            found = _clip_by_norms_(job, part, members, looked[list(members)], own)
        else:
            deferring = defer and part is job.assignment.whole
            found = _clip_quietly_(job, part, members, now[index], own, deferring)
        seen.update(members)
        clipped = clipped | found.clipped
        state = {**state, **part.prefixed(found.state)} if found.state else state
        if found.factors is not None:
            now = now.index_copy(0, index, now[index] * found.factors)
        elif measure or i + 1 < len(parts):
            tensors = [grads[m] for m in members]
            now = now.index_copy(0, index, unread_norms(tensors, order) / grads.loss_scale)
    broken = ~before.isfinite().all()
    flags = torch.stack([clipped.to(before.dtype), broken.to(before.dtype), _total(before, order)])
    record = UnreadRecord(
        flags,
        before,
        now if measure else None,
        skips=skips,
        deferred=found.deferred,
        share=found.share if measure else None,
        names=job.names(range(len(grads))),
        groups=grads.groups,
        order=order,
        state=state,
    )
    return record, looked


def unread_norms(tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norm of each tensor on its device, in float64 so that no square of a float32 overflows.

    Example:
        >>> unread_norms([torch.tensor([3e30, 4e30])], 2.0) < 1e31
        tensor([True])
    """
    values = [local_values(tensor) for tensor in tensors]
    wide = torch.float32 if values[0].device.type == "mps" else torch.float64
    complexes = any(value.is_complex() for value in values)
    if complexes:
        values = [
            torch.view_as_real(v) if v.is_complex() and order == 2 else v.abs() for v in values
        ]
    norms = [norm.to(wide) for norm in torch._foreach_norm(values, order, dtype=wide)]
    return reduce_norms(torch.stack(norms), tensors, order)


def _clip_quietly_(
    job: Job, part: Part, members: Sequence[int], norms: Tensor, state: State, defer: bool
) -> _Found:
    grads = [job.grads[m] for m in members]
    rule = part.rule
    if isinstance(rule, Norm):
        groups = [job.grads.groups[m] for m in members]
        return _scale_(rule, grads, norms, groups, state, defer)
    if isinstance(rule, Value):
        return _clamp_(grads, float(rule.limit))
    if isinstance(rule, AGC):
        return _scale_units_(rule, grads, job.params(members))
    return _indicate_(grads, float(getattr(rule, "threshold", 0.0)))


def _clip_by_norms_(
    job: Job, part: Part, members: Sequence[int], norms: Tensor, state: State
) -> _Found:
    """Clip by a rule that decides by norms, which are on the CPU."""
    grads = job.grads.unmeasured().select(members).with_norms(Measured(norms, job.order))
    params = job.params(members)
    plan, state = part.rule.plan(grads, params, state)
    clipped = plan.write_(grads, params).clipped
    device = grads[0].device
    factors = torch.ones(len(members), dtype=torch.float64, device="cpu")
    if isinstance(plan, Scale):
        factors *= float(plan.coefficient)
    elif isinstance(plan, ScaleEach):
        factors *= torch.tensor([plan.coefficients[id(param)] for param in params], device="cpu")
    return _Found(torch.tensor(clipped, device="cpu").to(device), factors.to(device), state=state)


def _scale_(
    rule: Norm,
    grads: Sequence[Tensor],
    norms: Tensor,
    groups: Sequence[int],
    state: State,
    defer: bool,
) -> _Found:
    limit, state = rule.limit(state)
    if rule.scope == "global":
        totals = _total(norms, rule.order).view(1)
    elif rule.scope == "group":
        known = sorted(set(groups))
        owners = _index([known.index(group) for group in groups], norms)
        totals = norms_of_owners_unread(norms, owners, len(known), rule.order)[owners]
    else:
        totals = norms
    coefficients = torch.ones_like(totals)
    if limit != float("inf"):
        coefficients = (limit / (totals + 1e-6)).clamp(max=1.0)
    clipped = (coefficients != 1.0).any()
    if rule.scope == "global" and defer:
        return _Found(clipped, coefficients, coefficients[0], state=state)
    tensors = [local_values(grad) for grad in grads]
    if rule.scope == "global":
        torch._foreach_mul_(tensors, coefficients[0])
    else:
        torch._foreach_mul_(tensors, list(coefficients.unbind()))
    return _Found(clipped, coefficients, state=state)


def _clamp_(grads: Sequence[Tensor], limit: float) -> _Found:
    values = [torch.view_as_real(grad) if grad.is_complex() else grad for grad in grads]
    largest = torch.stack([n.float() for n in torch._foreach_norm(values, float("inf"))])
    torch._foreach_clamp_min_(values, -limit)
    torch._foreach_clamp_max_(values, limit)
    return _Found((~(largest <= limit)).any())


def _scale_units_(rule: AGC, grads: Sequence[Tensor], params: Sequence[Tensor]) -> _Found:
    factors: list[Tensor] = []
    for grad, param in zip(grads, params, strict=True):
        units, own = (_unit_norms(tensor, rule.axis) for tensor in (grad, param))
        limits = own.clamp(min=float(rule.eps)).mul_(float(rule.ratio))
        factors.append(limits.div_(units.clamp(min=1e-6)).clamp_(max=1.0).to(grad.dtype))
    torch._foreach_mul_(list(grads), factors)
    return _Found(torch.stack([(~(factor >= 1)).any() for factor in factors]).any())


def _unit_norms(tensor: Tensor, axis: int) -> Tensor:
    """Return the norms of units in the shape that multiplies the tensor, without a look at overflow."""
    values = tensor.detach().abs() if tensor.is_complex() else tensor.detach()
    values = values if values.dtype in EXACT else values.float()
    if values.ndim < 2:
        whole: Tensor = torch.linalg.vector_norm(values)
        return whole
    dims = [d for d in range(values.ndim) if d != axis % values.ndim]
    norms: Tensor = torch.linalg.vector_norm(values, 2, dim=dims, keepdim=True)
    return norms


def _indicate_(grads: Sequence[Tensor], threshold: float) -> _Found:
    changed: list[Tensor] = []
    count: list[Tensor] = []
    for grad in grads:
        ones = ~(grad.abs() <= threshold)
        changed.append((grad != ones).any())
        count.append(ones.sum())
        grad.copy_(ones)
    total = sum(grad.numel() for grad in grads)
    return _Found(
        torch.stack(changed).any(), share=torch.stack(count).sum().float() / max(total, 1)
    )


def _index(members: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor(list(members), dtype=torch.int64, device="cpu").to(like.device)


def _total(norms: Tensor, order: float) -> Tensor:
    total: Tensor = torch.linalg.vector_norm(norms, order)
    return total
