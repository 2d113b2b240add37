"""Clipping: the one place that changes gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from clipquant.clip.assign import Assignment, Params, Part, assign
from clipquant.clip.finite import OnNonfinite, check_policy, nonfinite_members, zero_nonfinite_
from clipquant.clip.gradients import Gradients, writable
from clipquant.clip.norms import combine_norms
from clipquant.clip.plan import Plan, plan_of
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import Rule, State
from clipquant.clip.scale import Scale


@torch.no_grad()
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


@torch.no_grad()
def clip_assigned_(
    assignment: Assignment,
    state: State | None = None,
    *,
    on_nonfinite: OnNonfinite | Literal["leave"] = "skip",
    skip_above: float | None = None,
    measure: bool = True,
    defer: bool = False,
    loss_scale: float = 1.0,
) -> ClipRecord:
    """Clip in place what an assignment says; `clip_gradients_` with every choice in the open.

    Args:
        assignment: Parameters and their rules.
        state: State of all rules.
        on_nonfinite: Policy for NaN and infinite gradients; "leave" changes nothing and leaves them to a GradScaler.
        skip_above: Norm beyond which every gradient is set to None; None for no limit.
        measure: Whether to measure norms that no rule needs.
        defer: Leave a plan that is one coefficient for all gradients to the caller, in `ClipRecord.deferred`.
        loss_scale: Factor that the gradients still carry; norms and limits are meant without it.

    Returns:
        What was done.

    Raises:
        FloatingPointError: A gradient is not finite, under "raise".
    """
    present = tuple(i for i, param in enumerate(assignment.params) if param.grad is not None)
    if not present:
        return ClipRecord(state=dict(state or {}))
    job = _Job(assignment, present, _collect_(assignment, present, loss_scale), dict(state or {}))
    whole = assignment.whole
    streams = skip_above is None and on_nonfinite in ("skip", "leave", "propagate")
    single = len(assignment.parts) == 1
    if streams and single and whole is not None and getattr(whole.rule, "local", False):
        record = _clip_local_(job, whole, on_nonfinite != "propagate", measure)
        skip = on_nonfinite == "skip" and bool(record.nonfinite)
        return _without_gradients_(record, assignment.params) if skip else record
    record = ClipRecord()
    if on_nonfinite != "propagate":
        damaged = nonfinite_members(job.grads, job.order)
        record = replace(record, nonfinite=job.names(damaged))
        if damaged and on_nonfinite == "raise":
            raise FloatingPointError(_describe(record.nonfinite))
        if damaged and on_nonfinite == "leave":
            return job.record(record, job.grads.norms(job.order), None)
        if damaged and on_nonfinite == "zero":
            job = _zero_(job, damaged)
    over = skip_above is not None and float(job.grads.norm(job.order)) > skip_above
    if over or (on_nonfinite == "skip" and record.nonfinite):
        record = job.record(record, job.grads.norms(job.order), None)
        return _without_gradients_(record, assignment.params)
    return _clip_parts_(job, record, measure, defer)


def remove_gradients_(params: Iterable[Tensor]) -> None:
    """Set every gradient to None, which every optimizer of torch takes as: leave parameter and state as they are."""
    for param in params:
        param.grad = None


_SMALLEST = 1e-30  # the inverse of a coefficient must be a float32


@dataclass(frozen=True)
class _Job:
    """One call's gradients and what belongs to them."""

    assignment: Assignment
    present: tuple[int, ...]
    grads: Gradients
    state: State

    @property
    def order(self) -> float:
        return self.assignment.order

    def names(self, members: Iterable[int]) -> tuple[str, ...]:
        return tuple(self.assignment.names[self.present[i]] for i in members)

    def params(self, members: Sequence[int]) -> Sequence[Tensor]:
        if len(members) == len(self.assignment.params):
            return self.assignment.params
        return [self.assignment.params[self.present[i]] for i in members]

    def record(self, record: ClipRecord, before: Tensor | None, after: Tensor | None) -> ClipRecord:
        """Return the record with the norms, and the state where the record has none."""
        missing = len(self.present) < len(self.assignment.names)
        return replace(
            record,
            grad_norm=None if before is None else float(combine_norms(before, self.order)),
            grad_norm_clipped=None if after is None else float(combine_norms(after, self.order)),
            norms=before,
            norms_clipped=after,
            names=self.names(range(len(self.present))) if missing else self.assignment.names,
            groups=self.grads.groups,
            order=self.order,
            state=record.state or self.state,
        )


def _without_gradients_(record: ClipRecord, params: Sequence[Tensor]) -> ClipRecord:
    remove_gradients_(params)
    return replace(record, grad_norm_clipped=0.0, norms_clipped=None, clipped=False, skipped=True)


def _zero_(job: _Job, damaged: Iterable[int]) -> _Job:
    for i in damaged:
        zero_nonfinite_(job.grads[i])
    return replace(job, grads=job.grads.unmeasured())


def _clip_local_(job: _Job, part: Part, watch: bool, measure: bool) -> ClipRecord:
    """Clip by a rule that reads one gradient at a time, which measures and clips in one go.

    What is not finite stays as it is. Under "skip" other gradients are clipped already then, but the step is left out
    as a whole.
    """
    params = job.params(range(len(job.grads)))
    decision, own = part.rule.plan(job.grads, params, part.state(job.state))
    outcome = plan_of(part.rule, decision).write_(
        job.grads,
        params,
        leave=watch,
        tell=watch or measure,
        order=job.order if measure else None,
    )
    norms, clipped_norms = outcome.before, outcome.after
    if watch and not outcome.finite:
        known = job.grads if norms is None else job.grads.with_norms(norms, job.order)
        damaged = job.names(nonfinite_members(known, job.order))
        return job.record(ClipRecord(nonfinite=damaged, state=job.state), norms, None)
    state = {**job.state, **part.prefixed(own)}
    record = job.record(ClipRecord(clipped=outcome.clipped, state=state), norms, clipped_norms)
    return replace(record, nonzero_share=outcome.nonzero_share)


def _clip_parts_(job: _Job, record: ClipRecord, measure: bool, defer: bool) -> ClipRecord:
    """Clip by each part's rule, all of whose plan is made before anything of the part is written."""
    everything = job.grads
    before = everything.norms(job.order) if measure else None
    after = None if before is None else before.clone()
    seen: set[int] = set()  # gradients that an earlier part has changed
    index = {position: i for i, position in enumerate(job.present)}
    state, share = job.state, None
    for part in job.assignment.parts:
        members = [index[position] for position in part.members if position in index]
        if not members:
            continue
        grads = everything if len(members) == len(everything) else everything.select(members)
        if not seen.isdisjoint(members):
            grads = grads.unmeasured()
        params = job.params(members)
        decision, own = part.rule.plan(grads, params, part.state(state))
        plan = plan_of(part.rule, decision)
        state = {**state, **part.prefixed(own)}
        deferred = _deferrable(plan) if defer and part is job.assignment.whole else None
        if deferred is not None:
            record = replace(record, deferred=deferred)
            clipped = deferred != 1.0
        else:
            outcome = plan.write_(grads, params)
            clipped, share = outcome.clipped, outcome.nonzero_share if measure else None
            seen |= set(members) if clipped else set()
        record = replace(record, clipped=record.clipped or clipped)
        if clipped and after is not None:
            after[members] = plan.norms_after(grads, params, job.order).to(after.dtype)
    if before is None and job.grads.measured(job.order):
        before = job.grads.norms(job.order)
    return job.record(replace(record, state=state, nonzero_share=share), before, after)


def _deferrable(plan: Plan) -> float | None:
    """Return a plan's coefficient for all gradients, where an optimizer can divide by its inverse."""
    coefficient = float(plan.coefficient) if isinstance(plan, Scale) else 0.0
    return coefficient if coefficient > _SMALLEST else None


def _collect_(assignment: Assignment, present: Sequence[int], loss_scale: float) -> Gradients:
    """Return the gradients, each brought to a form whose stored values can be clipped in place."""
    tensors = []
    for i in present:
        grad = assignment.params[i].grad
        if grad is None:
            continue
        if (
            type(grad) is not Tensor
            or grad.layout is not torch.strided
            or grad.is_complex()
            or not grad.is_contiguous()
            or grad.is_inference()
        ):
            assignment.params[i].grad = grad = writable(grad)
        tensors.append(grad)
    groups = assignment.groups
    if len(present) < len(groups):
        groups = tuple(groups[i] for i in present)
    return Gradients(tensors, groups, present, loss_scale)


def _describe(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"NaN or infinite gradients in {shown}: find the cause with torch.autograd.set_detect_anomaly(True), "
        'or set on_nonfinite="skip" to leave out such steps'
    )
