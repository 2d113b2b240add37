"""Which parameters of an optimizer GradientClipCallback clips, and by which rule."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any
from weakref import WeakSet

import lightning.pytorch as pl
from torch.optim import Optimizer

from clipquant.callbacks.clip_checks import refuse_zero
from clipquant.clip.assign import OVERRIDE, Assignment, as_rule, assign
from clipquant.clip.rule import Rule

_KEEPING: WeakSet[Optimizer] = WeakSet()  # optimizers whose saved states hold no rule


class Targets:
    """The parameters of one optimizer, divided among the callback's rule and those of parameter groups.

    Args:
        optimizer: The optimizer.
        rule: What clips the parameters of groups without a rule of their own.
        include: Globs over parameter names; only these are clipped. None for all.
        exclude: Globs over parameter names; these are not clipped.

    Raises:
        TypeError: A group's rule is none.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        rule: Rule,
        include: Sequence[str] | None,
        exclude: Sequence[str] | None,
    ) -> None:
        self.optimizer, self.rule, self.include, self.exclude = optimizer, rule, include, exclude
        self._held: list[Any] = []
        self._assignment: Assignment | None = None
        keep_rules_out_of_states(optimizer)
        for index, group in enumerate(optimizer.param_groups):
            if group.get(OVERRIDE) is not None:
                refuse_zero(group[OVERRIDE], f'parameter group {index}, key "{OVERRIDE}"')
                as_rule(group[OVERRIDE])

    def assignment(self, pl_module: pl.LightningModule) -> Assignment:
        """Return who clips what of all that the optimizer holds now; made anew only when that has changed."""
        groups = self.optimizer.param_groups
        held = [(*map(id, g["params"]), id(g[OVERRIDE]) if OVERRIDE in g else None) for g in groups]
        if self._assignment is None or held != self._held:
            names = parameter_names(pl_module)
            self._assignment = assign(
                groups,
                self.rule,
                {key: aliases[0] for key, aliases in names.items()},
                lambda param: self._chosen(names.get(id(param), [])),
            )
            # The assignment holds the parameters, so that none of these ids can come to mean another one.
            self._held = held
        return self._assignment

    def _chosen(self, names: Sequence[str]) -> bool:
        included = self.include is None or any(
            fnmatchcase(n, glob) for n in names for glob in self.include
        )
        return included and not any(
            fnmatchcase(n, glob) for n in names for glob in self.exclude or []
        )


def keep_rules_out_of_states(optimizer: Optimizer) -> None:
    """Make what `optimizer.state_dict()` returns hold no rule, and loading leave the groups' rules as they are.

    A rule in a saved state could not be loaded by `torch.load(weights_only=True)`. In the parameter groups it stays: in
    every later fit with this optimizer, whatever ended this one.
    """
    if optimizer in _KEEPING:
        return
    _KEEPING.add(optimizer)
    optimizer.register_state_dict_post_hook(_without_rules)
    optimizer.register_load_state_dict_pre_hook(_with_own_rules)


def keep_rules_out_of_checkpoint(
    optimizers: Sequence[Optimizer], checkpoint: MutableMapping[str, Any]
) -> None:
    """Keep the rules of parameter groups out of a file, whoever asked for it and when."""
    for optimizer in optimizers:
        keep_rules_out_of_states(optimizer)
    if "optimizer_states" in checkpoint:
        checkpoint["optimizer_states"] = list(map(without_rules, checkpoint["optimizer_states"]))


def without_rules(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return an optimizer's state dict without the rules of its parameter groups."""
    groups = state.get("param_groups", [])
    if not any(isinstance(group, Mapping) and OVERRIDE in group for group in groups):
        return dict(state)
    kept = [{key: value for key, value in g.items() if key != OVERRIDE} for g in groups]
    return {**state, "param_groups": kept}


def _without_rules(_: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return without_rules(state)


def _with_own_rules(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """Return a state to load, its groups with the rules that the optimizer's own groups have."""
    state = without_rules(state)
    own = [
        {OVERRIDE: group[OVERRIDE]} if OVERRIDE in group else {} for group in optimizer.param_groups
    ]
    if len(own) == len(state["param_groups"]):  # else torch says what does not fit
        groups = [{**g, **o} for g, o in zip(state["param_groups"], own, strict=True)]
        state["param_groups"] = groups
    return state


def parameter_names(pl_module: pl.LightningModule) -> dict[int, list[str]]:
    """Return all names of each parameter by its `id`: a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, param in pl_module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name.replace("_orig_mod.", ""))
    return names


def index_of(
    optimizer: Optimizer, known: Sequence[Optimizer], chosen: Sequence[int] | None
) -> int | None:
    """Return the index of an optimizer if it is to be clipped; one exchanged behind the Trainer's back counts.

    Args:
        optimizer: The optimizer that is about to step.
        known: The Trainer's optimizers.
        chosen: Indices of those to clip; None for all.
    """
    index = next((i for i, each in enumerate(known) if each is optimizer), None)
    if index is None and (len(known) == 1 or chosen is None):
        index = 0 if len(known) == 1 else len(known)
    return index if chosen is None or index in chosen else None


def within(assignment: Assignment, step: int, start: int, stop: int | None) -> Assignment:
    """Return the assignment, or one that clips nothing where the step is outside [start, stop)."""
    inside = start <= step and (stop is None or step < stop)
    return assignment if inside else replace(assignment, parts=())
