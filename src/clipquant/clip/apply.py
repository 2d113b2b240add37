"""Clipping: the one place that changes gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from clipquant.clip.assign import Assignment, Params, Part, assign
from clipquant.clip.finite import (
    NonfiniteError,
    OnNonfinite,
    check_policy,
    nonfinite_members,
    told,
    zero_nonfinite_,
)
from clipquant.clip.job import Job, gather_
from clipquant.clip.measured import Measured
from clipquant.clip.plan import Plan, plan_of
from clipquant.clip.record import ClipRecord
from clipquant.clip.remote import clip_remote_, is_remote, unread_norms
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import Scale
from clipquant.clip.small import clamp_small_


def clip_gradients_(
    params: Params,
    rule: Rule | float,
    state: State | None = None,
    *,
    on_nonfinite: OnNonfinite = "propagate",
    measure: bool = False,
) -> ClipRecord:
    """Clip the gradients of `params` in place; gradients that the rule leaves alone stay bit for bit.

    Args:
        params: A tensor, tensors, (name, tensor) pairs, a dict of tensors by name, a module, an optimizer or its
            `param_groups`, where a group's key "clip" holds a rule of its own. Parameters without a gradient are left
            alone, tied ones count once.
        rule: What clips; a number c means `Value(c)`.
        state: The state that the previous call's record carries; None before the first.
        on_nonfinite: What NaN or infinite gradients lead to: "skip" sets every gradient to None, "zero" zeroes the
            non-finite elements, "raise" raises, "propagate" lets the rule work on them.
        measure: Whether to measure norms that the rule itself does not need. Without, `Value` under "propagate" is one
            pass that does not look whether it clips, and its record says that it did.

    Returns:
        What was done, with the state for the next call.

    Raises:
        FloatingPointError: A gradient is not finite, under "raise"; the message names the parameters.
        TypeError: `rule` is no rule.
        ValueError: `on_nonfinite` is none of the four.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> weight.grad = torch.tensor([3.0, 0.5])
        >>> record = clip_gradients_(weight, 1.0)
        >>> weight.grad
        tensor([1.0000, 0.5000])
    """
    return clip_assigned_(
        assign(params, rule), state, on_nonfinite=check_policy(on_nonfinite), measure=measure
    )


def clip_assigned_(
    assignment: Assignment,
    state: State | None = None,
    *,
    on_nonfinite: OnNonfinite | Literal["leave", "defer"] = "skip",
    skip_above: float | None = None,
    measure: bool = True,
    defer: bool = False,
    loss_scale: float = 1.0,
    later: bool = False,
) -> ClipRecord:
    """Clip in place what an assignment says; `clip_gradients_` with every choice in the open.

    Args:
        assignment: Parameters and their rules.
        state: State of all rules.
        on_nonfinite: Policy for NaN and infinite gradients; "leave" changes nothing and leaves them to a GradScaler,
            "defer" leaves the decision to skip to an optimizer that makes it on an accelerator; elsewhere it is "skip".
        skip_above: Norm beyond which every gradient is set to None; None for no limit.
        measure: Whether to measure norms that no rule needs.
        defer: Leave a plan that is one coefficient for all gradients to the caller, in `ClipRecord.deferred`.
        loss_scale: Factor that the gradients still carry; norms and limits are meant without it.
        later: Whether norms after clipping that cost a pass of their own may be left to whoever reads them, while the
            gradients are there and unchanged.

    Returns:
        What was done.

    Raises:
        FloatingPointError: A gradient is not finite, under "raise".
    """
    streams = skip_above is None and on_nonfinite not in ("raise", "zero")
    if streams and assignment.limit is not None and loss_scale == 1.0 and not state:
        record = clamp_small_(assignment, on_nonfinite != "propagate", measure)
        if record is not None:
            return record
    with torch.no_grad():
        job = Job(assignment, gather_(assignment, loss_scale, later), state or {})
        return _clip_(job, on_nonfinite, skip_above, measure, defer)


def _clip_(
    job: Job,
    on_nonfinite: OnNonfinite | Literal["leave", "defer"],
    skip_above: float | None,
    measure: bool,
    defer: bool,
) -> ClipRecord:
    assignment = job.assignment
    if not job.grads.tensors:
        return ClipRecord(state=dict(job.state))
    if is_remote(job):
        return _clip_remotely_(job, on_nonfinite, skip_above, measure, defer)
    on_nonfinite = "skip" if on_nonfinite == "defer" else on_nonfinite
    only = assignment.whole if len(assignment.parts) == 1 else None
    streams = skip_above is None and on_nonfinite in ("skip", "leave", "propagate")
    if streams and only is not None and getattr(only.rule, "local", False):
        record = _clip_local_(job, only, on_nonfinite != "propagate", measure)
        skip = on_nonfinite == "skip" and bool(record.nonfinite)
        return _without_gradients_(record, assignment.params) if skip else record
    nonfinite, job, ending = _look_(job, on_nonfinite, skip_above)
    return _clip_parts_(job, nonfinite, measure, defer) if ending is None else ending


def _look_(
    job: Job, on_nonfinite: OnNonfinite | Literal["leave"], skip_above: float | None
) -> tuple[tuple[str, ...], Job, ClipRecord | None]:
    """Look at the norms first; return names of what is not finite, what to clip, or the record where that is all."""
    nonfinite: tuple[str, ...] = ()
    if on_nonfinite != "propagate":
        damaged = nonfinite_members(job.grads, job.order)
        nonfinite = job.names(damaged)
        if damaged and on_nonfinite == "raise":
            raise NonfiniteError(told(nonfinite))
        if damaged and on_nonfinite == "leave":
            before = job.grads.measured(job.order)
            return nonfinite, job, job.record(nonfinite=nonfinite, before=before)
        if damaged and on_nonfinite == "zero":
            job = _zero_(job, damaged)
    over = skip_above is not None and job.grads.measured(job.order).total > skip_above
    if over or (on_nonfinite == "skip" and nonfinite):
        record = job.record(nonfinite=nonfinite, before=job.grads.measured(job.order))
        return nonfinite, job, _without_gradients_(record, job.assignment.params)
    return nonfinite, job, None


def _clip_remotely_(
    job: Job,
    on_nonfinite: OnNonfinite | Literal["leave", "defer"],
    skip_above: float | None,
    measure: bool,
    defer: bool,
) -> ClipRecord:
    """Clip on an accelerator, where one value at most is read: only where it decides what happens here."""
    if skip_above is None and on_nonfinite in ("propagate", "defer"):
        return clip_remote_(job, measure, defer, skips=on_nonfinite == "defer")[0]
    if skip_above is None and on_nonfinite == "skip":
        record, norms = clip_remote_(job, measure, defer, skips=True)
        if norms is not None and bool(norms.isfinite().all()):
            return record.without_skip()
        known = record.read()[0]
        if not known.skipped:
            return known if record.coefficient is None else record.without_skip()
        return _without_gradients_(replace(known, state=dict(job.state)), job.assignment.params)
    norms = (unread_norms(job.grads.tensors, job.order) / job.grads.loss_scale).to("cpu")
    looked = replace(job, grads=job.grads.with_norms(Measured(norms, job.order)))
    policy: OnNonfinite | Literal["leave"] = "skip" if on_nonfinite == "defer" else on_nonfinite
    nonfinite, left, ending = _look_(looked, policy, skip_above)
    if ending is not None:
        return ending
    looks = None if nonfinite else norms
    record, _ = clip_remote_(left, measure, defer, skips=False, looked=looks)
    return record if not nonfinite else replace(record.read()[0], nonfinite=nonfinite)


def remove_gradients_(params: Iterable[Tensor]) -> None:
    """Set every gradient to None, which every optimizer of torch takes as: leave parameter and state as they are."""
    for param in params:
        param.grad = None


_SMALLEST = 1e-30  # the inverse of a coefficient must be a float32


def _without_gradients_(record: ClipRecord, params: Sequence[Tensor]) -> ClipRecord:
    remove_gradients_(params)
    return replace(record, after=None, clipped=False, skipped=True)


def _zero_(job: Job, damaged: Iterable[int]) -> Job:
    for i in damaged:
        zero_nonfinite_(job.grads[i])
    return replace(job, grads=job.grads.unmeasured())


def _clip_local_(job: Job, part: Part, watch: bool, measure: bool) -> ClipRecord:
    """Clip by a rule that reads one gradient at a time, which measures and clips in one go.

    What is not finite stays as it is. Under "skip" other gradients are clipped already then, but the step is left out
    as a whole.
    """
    grads = job.grads
    params = job.params(range(len(grads)))
    decision, own = part.rule.plan(grads, params, part.state(job.state))
    order = job.order if measure else None
    outcome = plan_of(part.rule, decision).write_(
        grads, params, leave=watch, tell=watch or measure, order=order
    )
    if watch and not outcome.finite:
        known = grads if outcome.before is None else grads.with_norms(outcome.before)
        damaged = job.names(nonfinite_members(known, job.order))
        return job.record(nonfinite=damaged, before=outcome.before)
    return job.record(
        clipped=outcome.clipped,
        before=outcome.before,
        after=outcome.after,
        nonzero_share=outcome.nonzero_share,
        state={**job.state, **part.prefixed(own)} if own or job.state else {},
    )


def _clip_parts_(job: Job, nonfinite: tuple[str, ...], measure: bool, defer: bool) -> ClipRecord:
    """Clip by each part's rule, all of whose plan is made before anything of the part is written."""
    everything, order = job.grads, job.order
    before = everything.measured(order) if measure or everything.knows(order) else None
    after, state = before, job.state
    clipped, deferred, share = False, None, None
    seen: set[int] = set()  # gradients that an earlier part has changed
    for part, members in job.parts():
        grads = everything if len(members) == len(everything) else everything.select(members)
        if not seen.isdisjoint(members):
            grads = grads.unmeasured()
        params = job.params(members)
        decision, own = part.rule.plan(grads, params, part.state(state))
        plan = plan_of(part.rule, decision)
        state = {**state, **part.prefixed(own)} if own else state
        deferred = _deferrable(plan) if defer and part is job.assignment.whole else None
        if deferred is not None:
            changed = deferred != 1.0
        else:
            outcome = plan.write_(grads, params)
            changed, share = outcome.clipped, outcome.nonzero_share if measure else None
        if not changed:
            continue
        clipped = True
        seen.update(members)
        if measure and after is not None:
            norms = plan.norms_after(grads, params, order)
            after = norms if len(members) == len(everything) else _replaced(after, members, norms)
    if before is None and everything.knows(order):
        before = everything.measured(order)
    return job.record(
        clipped=clipped,
        nonfinite=nonfinite,
        deferred=deferred,
        before=before,
        after=after if measure else None,
        nonzero_share=share,
        state=state,
    )


def _replaced(norms: Measured, members: Sequence[int], own: Measured) -> Measured:
    """Return the norms with those of some gradients replaced."""
    each = norms.each.clone()
    each[list(members)] = own.each.to(each.dtype)
    return Measured(each, norms.order)


def _deferrable(plan: Plan) -> float | None:
    """Return a plan's coefficient for all gradients, where an optimizer can divide by its inverse."""
    coefficient = float(plan.coefficient) if isinstance(plan, Scale) else 0.0
    return coefficient if coefficient > _SMALLEST else None
