"""Who clips what: the parameters of one optimizer, divided among rules."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipquant.clip.rule import METHODS, Rule, State
from clipquant.clip.rules import Value
from clipquant.errors import ArgumentTypeError

OVERRIDE = "clip"  # key of a parameter group that holds a rule of its own, a number for Value, or None for no clipping

Params = Tensor | Iterable[Tensor] | Iterable[tuple[str, Tensor]] | Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Part:
    """The parameters that share one rule.

    Args:
        rule: What clips them.
        members: Their positions among all parameters.
        prefix: What the keys of their state begin with.
    """

    rule: Rule
    members: tuple[int, ...]
    prefix: str = ""

    def state(self, states: State) -> State:
        """Return this part's state out of all states; the rule's initial one where there is none."""
        own = {
            key.removeprefix(self.prefix): value
            for key, value in states.items()
            if key.startswith(self.prefix)
        }
        return own or self.rule.init()

    def prefixed(self, state: State) -> State:
        """Return `state` under this part's keys."""
        return {self.prefix + key: value for key, value in state.items()}


@dataclass(frozen=True)
class Assignment:
    """All parameters of one optimizer, each once, and the rule that clips each.

    Args:
        params: The parameters; a tied one appears once.
        names: Their names, or their positions as text.
        groups: Index of the parameter group of each.
        parts: Disjoint parts; a parameter in none is not clipped.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def whole(self) -> Part | None:
        """The one part that covers every parameter, if there is one."""
        only = self.parts[0] if len(self.parts) == 1 else None
        return only if only is not None and len(only.members) == len(self.params) else None

    @property
    def order(self) -> float:
        """Order of the norm that the first part's rule reads anyway, so that one pass serves it and the record."""
        return float(getattr(self.parts[0].rule, "order", 2.0)) if self.parts else 2.0


def assign(
    params: Params,
    rule: Rule | float,
    names: Mapping[int, str] | None = None,
    chosen: Callable[[Tensor], bool] | None = None,
) -> Assignment:
    """Divide parameters among `rule` and the rules that parameter groups bring under the key "clip".

    Args:
        params: A tensor, tensors, (name, tensor) pairs, or the `param_groups` of an optimizer.
        rule: What clips every parameter whose group says nothing else; a number c means `Value(c)`.
        names: Names by `id` of the parameter.
        chosen: Which parameters to clip at all; None for all.

    Returns:
        The assignment.

    Raises:
        TypeError: A rule lacks one of the three methods.

    Example:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> assign([w, w, torch.zeros(3)], 1.0).names
        ('0', '1')
    """
    main = as_rule(rule)
    known = dict(names or {})
    entries: dict[int, tuple[Tensor, int]] = {}
    overrides: dict[int, Any] = {}
    for index, group in enumerate(_groups(params)):
        if OVERRIDE in group:
            overrides[index] = group[OVERRIDE]
        for item in group["params"]:
            name, param = item if isinstance(item, tuple) else (None, item)
            entries.setdefault(id(param), (param, index))
            if name is not None:
                known.setdefault(id(param), name)
    kept = list(entries.values())
    clipped = [i for i, (param, _) in enumerate(kept) if chosen is None or chosen(param)]
    groups = tuple(group for _, group in kept)
    return Assignment(
        params=tuple(param for param, _ in kept),
        names=tuple(known.get(id(param), str(i)) for i, (param, _) in enumerate(kept)),
        groups=groups,
        parts=_parts(main, overrides, clipped, groups),
    )


def as_rule(rule: Any) -> Rule:
    """Return `rule`, or `Value(rule)` for a number.

    Raises:
        TypeError: `rule` is neither a number nor an object with the methods `init`, `plan` and `clip`.
    """
    if isinstance(rule, (int, float)) and not isinstance(rule, bool):
        return Value(float(rule))
    missing = [name for name in METHODS if not callable(getattr(rule, name, None))]
    if missing or isinstance(rule, type):
        given = (
            f"the class {rule.__name__}, not an instance of it"
            if isinstance(rule, type)
            else repr(rule)
        )
        lacks = f" (it lacks {', '.join(missing)})" if missing else ""
        raise ArgumentTypeError(
            f"a rule must be a number or an object with the methods init, plan and clip, got {given}{lacks}: "
            "give e.g. 1.0, Norm(1.0) or AGC(0.01)"
        )
    checked: Rule = rule
    return checked


def _groups(params: Params) -> list[Mapping[str, Any]]:
    """Return parameters of any accepted form as parameter groups."""
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if items and isinstance(items[0], Mapping):
        return items
    return [{"params": items}]


def _parts(
    main: Rule, overrides: Mapping[int, Any], clipped: list[int], groups: tuple[int, ...]
) -> tuple[Part, ...]:
    rest = tuple(i for i in clipped if groups[i] not in overrides)
    parts = [Part(main, rest)] if rest else []
    for group, override in overrides.items():
        members = tuple(i for i in clipped if groups[i] == group)
        if override is not None and members:
            parts.append(Part(as_rule(override), members, f"group{group}."))
    return tuple(parts)
