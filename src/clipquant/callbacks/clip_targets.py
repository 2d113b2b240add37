"""Which parameters of an optimizer GradientClipCallback clips, and by which rule."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
from torch.optim import Optimizer

from clipquant.clip.assign import OVERRIDE, Assignment, as_rule, assign
from clipquant.clip.rule import Rule


class Targets:
    """The parameters of one optimizer, divided among the callback's rule and those of parameter groups.

    While training, the rules are kept out of the parameter groups, for they would end up pickled in checkpoints.

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
        self._overrides: dict[int, Rule | None] = {}
        self._sizes: tuple[int, ...] = ()
        self._assignment: Assignment | None = None
        self._take_overrides()

    def assignment(self, pl_module: pl.LightningModule) -> Assignment:
        """Return who clips what, made once and again when parameters were added to the optimizer."""
        groups = self.optimizer.param_groups
        sizes = tuple(len(group["params"]) for group in groups)
        if self._assignment is None or sizes != self._sizes:
            self._take_overrides()
            own = [
                {OVERRIDE: self._overrides[i]} if i in self._overrides else {}
                for i in range(len(groups))
            ]
            names = parameter_names(pl_module)
            self._assignment = assign(
                [{"params": group["params"], **o} for group, o in zip(groups, own, strict=True)],
                self.rule,
                {key: aliases[0] for key, aliases in names.items()},
                lambda param: self._chosen(names.get(id(param), [])),
            )
            self._sizes = sizes
        return self._assignment

    def give_back(self) -> None:
        """Put the rules back into the parameter groups."""
        for group, override in self._overrides.items():
            if group < len(self.optimizer.param_groups):
                self.optimizer.param_groups[group][OVERRIDE] = override

    def _chosen(self, names: Sequence[str]) -> bool:
        included = self.include is None or any(
            fnmatchcase(n, glob) for n in names for glob in self.include
        )
        return included and not any(
            fnmatchcase(n, glob) for n in names for glob in self.exclude or []
        )

    def _take_overrides(self) -> None:
        for i, group in enumerate(self.optimizer.param_groups):
            if OVERRIDE in group:
                override: Any = group.pop(OVERRIDE)
                self._overrides[i] = None if override is None else as_rule(override)


def parameter_names(pl_module: pl.LightningModule) -> dict[int, list[str]]:
    """Return all names of each parameter by its `id`: a tied one has several."""
    names: dict[int, list[str]] = {}
    for name, param in pl_module.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name.replace("_orig_mod.", ""))
    return names
