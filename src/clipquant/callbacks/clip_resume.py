"""When GradientClipCallback goes on where an earlier fit stopped, and by which names it finds its state."""

from __future__ import annotations

import re
import weakref
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from clipquant.clip.assign import Assignment
from clipquant.clip.progress import Progress
from clipquant.clip.rule import Rule, State


@dataclass
class Resume:
    """Where the callback stands between fits.

    Args:
        loaded: Whether a state was loaded since the last fit ended.
        seen: Indices of the optimizers that took a step in this fit.
        set_up: Whether a Trainer has set the callback up, ever.
    """

    loaded: bool = False
    seen: set[int] = field(default_factory=set)
    set_up: bool = False
    _module: weakref.ref[Any] | None = field(default=None, repr=False)

    def goes_on(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
        """Return whether a fit that starts continues the last one: from a state, or the same module after step 0."""
        self.seen = set()
        same = self._module is not None and self._module() is pl_module
        return self.loaded or (same and trainer.global_step > 0)

    def begun(self, index: int, progress: dict[int, Progress], assignment: Assignment) -> Progress:
        """Return the progress of an optimizer, without states that its rules cannot go on from at its first step."""
        own = progress.setdefault(index, Progress())
        if index not in self.seen:
            self.seen.add(index)
            own = progress[index] = own.fitting(assignment, rank_zero_warn)
        return own

    def end(self, pl_module: pl.LightningModule) -> None:
        """Remember which module was fitted."""
        self.loaded, self._module = False, weakref.ref(pl_module)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_module": None}  # a weak reference cannot be pickled


def kind_of(rule: Rule) -> str:
    """Return the path of a rule's class."""
    return public_kind(f"{type(rule).__module__}.{type(rule).__qualname__}")


def public_kind(kind: str) -> str:
    """Return the path of a rule's class; that of this package's rules without the file that they stand in."""
    return re.sub(r"^clipquant\.clip\..*\.", "clipquant.clip.", kind)


def described(rule: Rule) -> str:
    """Return what tells a rule from others, the same in every process."""
    return repr(rule) if is_dataclass(rule) else kind_of(rule)


def saved(rule: Rule, progress: Mapping[int, Progress]) -> dict[str, Any]:
    """Return what a checkpoint holds: the kind of the rule, and each optimizer's progress by its index."""
    return {
        "rule": kind_of(rule),
        "optimizers": {i: each.state_dict() for i, each in progress.items()},
    }


def restored(rule: Rule, state: Mapping[str, Any]) -> dict[int, Progress]:
    """Return the progress that `saved` was given, without states that another rule than `rule` has left."""
    progress = {int(i): Progress.from_state_dict(own) for i, own in state["optimizers"].items()}
    kind = public_kind(state["rule"])
    if kind == kind_of(rule) or not any(p.state for p in progress.values()):
        return progress
    rank_zero_warn(
        f"the checkpoint was written with the rule {kind}, this run clips with {kind_of(rule)}: counts go on, the "
        "state of the rule starts anew"
    )
    return {i: replace(p, state=states_of_groups(p.state)) for i, p in progress.items()}


def settings_in_key(callback: Any) -> dict[str, Any]:
    """Return what tells the states of clipping callbacks apart in a checkpoint."""
    return {
        "optimizers": callback.optimizers,
        "include": callback.include,
        "exclude": callback.exclude,
        "rule": described(callback.rule),
    }


def state_of_another_rule(
    saved: Mapping[str, Any], key: str, claimed: Collection[str]
) -> dict[str, Any] | None:
    """Return the saved state of a callback for the same optimizers and parameters whose rule was another, if any.

    Args:
        saved: The states of all callbacks in a checkpoint, by key.
        key: Key of the callback that looks for its state; None is returned where it has one.
        claimed: Keys of all clipping callbacks of this run.
    """
    if key in saved:
        return None
    alike = [k for k in saved if _targets(k) == _targets(key) and k not in claimed]
    return saved[alike[0]] if alike else None


def _targets(key: str) -> str:
    return key.partition(", 'rule': ")[0].removesuffix("}")


def states_of_groups(state: State) -> State:
    """Return of the states of all rules those of rules that parameter groups bring."""
    return {key: value for key, value in state.items() if re.match(r"group\d+\.", key)}
