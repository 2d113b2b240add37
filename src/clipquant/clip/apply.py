"""Clipping: the one place that changes gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from clipquant.clip.assign import Assignment, Params, assign
from clipquant.clip.finite import OnNonfinite, check_policy, nonfinite_members, zero_nonfinite_
from clipquant.clip.norms import Gradients, combine_norms
from clipquant.clip.plans import Scale
from clipquant.clip.rules import Rule, State
from clipquant.clip.write import carry_out_, norms_after, writable


@dataclass(frozen=True)
class ClipRecord:
    """What one call did, as plain numbers, and the state for the next call.

    Args:
        grad_norm: Norm of all gradients before clipping; None where it was not asked for.
        grad_norm_clipped: The same after clipping; 0 for a step that was skipped.
        clipped: Whether any gradient was changed by the rule.
        skipped: Whether all gradients were removed, so that the optimizer leaves everything as it is.
        nonfinite: Names (positions where there are none) of the parameters with a NaN or infinite gradient.
        deferred: Coefficient that the caller has to apply to all gradients, where it asked for that; norms count it in.
        norms: Norm of each gradient before clipping, in the order of `names`; None where not measured.
        norms_clipped: The same after clipping.
        names: Names of the parameters that had a gradient.
        groups: Index of the parameter group of each of these.
        order: Order of all norms here: that of a `Norm` rule, else 2.
        state: State of the rule after the call, a flat dict of tensors.
    """

    grad_norm: float | None = None
    grad_norm_clipped: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: tuple[str, ...] = ()
    deferred: float | None = None
    norms: Tensor | None = field(default=None, repr=False)
    norms_clipped: Tensor | None = field(default=None, repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)
    order: float = field(default=2.0, repr=False)
    state: State = field(default_factory=dict, repr=False)

    @property
    def clip_coef(self) -> float | None:
        """Share of the norm that clipping left, `grad_norm_clipped / grad_norm`; 1 for a norm of zero."""
        if self.grad_norm is None or self.grad_norm_clipped is None:
            return None
        return self.grad_norm_clipped / self.grad_norm if self.grad_norm else 1.0


@torch.no_grad()
def clip_gradients_(
    params: Params,
    rule: Rule | float,
    state: State | None = None,
    *,
    on_nonfinite: OnNonfinite = "propagate",
    measure: bool = True,
) -> ClipRecord:
    """Clip the gradients of `params` in place; gradients that the rule leaves alone stay bit for bit.

    Args:
        params: A tensor, tensors, (name, tensor) pairs, or the `param_groups` of an optimizer, where a group's key
            "clip" holds a rule of its own. Parameters without a gradient are left alone, tied ones count once.
        rule: What clips; a number c means `Value(c)`.
        state: The state that the previous call's record carries; None before the first.
        on_nonfinite: What NaN or infinite gradients lead to: "skip" sets every gradient to None, "zero" zeroes the
            non-finite elements, "raise" raises, "propagate" lets the rule work on them.
        measure: Whether to measure norms that the rule itself does not need, for the record.

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
        >>> weight.grad, record.clipped
        (tensor([1.0000, 0.5000]), True)
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
    state = dict(state or {})
    present = [i for i, param in enumerate(assignment.params) if param.grad is not None]
    if not present:
        return ClipRecord(state=state)
    grads = _collect_(assignment, present, loss_scale)
    order = assignment.order
    nonfinite: tuple[str, ...] = ()
    if on_nonfinite != "propagate" or skip_above is not None:
        damaged = nonfinite_members(grads, order)
        nonfinite = tuple(assignment.names[present[i]] for i in damaged)
        if damaged and on_nonfinite == "raise":
            raise FloatingPointError(_describe(nonfinite))
        if damaged and on_nonfinite == "leave":
            return ClipRecord(float(grads.norm(order)), None, nonfinite=nonfinite, state=state)
        if damaged and on_nonfinite == "zero":
            for i in damaged:
                zero_nonfinite_(grads[i])
            grads = _collect_(assignment, present, loss_scale)
        over = skip_above is not None and float(grads.norm(order)) > skip_above
        if over or (damaged and on_nonfinite == "skip"):
            remove_gradients_(assignment.params)
            return ClipRecord(
                float(grads.norm(order)), 0.0, skipped=True, nonfinite=nonfinite, state=state
            )
    return _clip_parts_(assignment, present, grads, state, nonfinite, measure, defer)


def remove_gradients_(params: Iterable[Tensor]) -> None:
    """Set every gradient to None, which every optimizer of torch takes as: leave parameter and state as they are."""
    for param in params:
        param.grad = None


def _clip_parts_(
    assignment: Assignment,
    present: Sequence[int],
    grads: Gradients,
    state: State,
    nonfinite: tuple[str, ...],
    measure: bool,
    defer: bool,
) -> ClipRecord:
    order = assignment.order
    before = grads.norms(order) if measure else None
    index = {position: i for i, position in enumerate(present)}
    after = before.clone() if before is not None else None
    clipped, deferred = False, None
    for part in assignment.parts:
        members = [index[position] for position in part.members if position in index]
        if not members:
            continue
        chosen = grads if len(members) == len(grads) else grads.select(members)
        params = [assignment.params[present[i]] for i in members]
        plan, own = part.rule.plan(chosen, params, part.state(state))
        state = {**state, **part.prefixed(own)}
        if defer and isinstance(plan, Scale) and part is assignment.whole:
            deferred = float(plan.coefficient)
            changed = deferred != 1.0
        else:
            changed = carry_out_(part.rule, plan, chosen, params)
        clipped = clipped or changed
        if changed and after is not None:
            after[members] = norms_after(plan, chosen, params, order)
    if before is None and grads.measured(order):
        before = grads.norms(order)
    return ClipRecord(
        grad_norm=None if before is None else float(combine_norms(before, order)),
        grad_norm_clipped=None if after is None else float(combine_norms(after, order)),
        clipped=clipped,
        nonfinite=nonfinite,
        deferred=deferred,
        norms=before,
        norms_clipped=after,
        names=tuple(assignment.names[i] for i in present),
        groups=tuple(assignment.groups[i] for i in present),
        order=order,
        state=state,
    )


def _collect_(assignment: Assignment, present: Sequence[int], loss_scale: float) -> Gradients:
    """Return the gradients, each brought to a form whose stored values can be clipped in place."""
    tensors = []
    for i in present:
        param = assignment.params[i]
        grad = param.grad
        if grad is None:
            continue
        ready = writable(grad)
        if ready is not grad:
            param.grad = ready
        tensors.append(ready)
    return Gradients(
        tensors,
        [assignment.groups[i] for i in present],
        present,
        loss_scale,
    )


def _describe(names: Sequence[str]) -> str:
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"NaN or infinite gradients in {shown}: find the cause with torch.autograd.set_detect_anomaly(True), "
        'or set on_nonfinite="skip" to leave out such steps'
    )
