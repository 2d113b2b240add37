"""Who clips what: the parameters of one optimizer, divided among rules."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from clipquant.clip.checks import is_number
from clipquant.clip.rule import METHODS, Rule, State
from clipquant.clip.rules import AGC, AdaGC, AutoClip, Chain, Indicator, Norm, Value, ZClip
from clipquant.errors import ArgumentTypeError

OVERRIDE = "clip"  # key of a parameter group that holds a rule of its own, a number for Value, or None for no clipping

_OWN = frozenset((AGC, AdaGC, AutoClip, Chain, Indicator, Norm, Value, ZClip))

_GROUPS_KEY = re.compile(r"group\d+\.")  # what the keys of a group's own state begin with

Params = (
    Tensor
    | Iterable[Tensor]
    | Iterable[tuple[str, Tensor]]
    | Iterable[Mapping[str, Any]]
    | Mapping[str, Any]
    | nn.Module
    | Optimizer
)


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
        return self.found(states) or self.rule.init()

    def found(self, states: State) -> State:
        """Return this part's state out of all states; empty where there is none."""
        return {
            key.removeprefix(self.prefix): value
            for key, value in states.items()
            if key.startswith(self.prefix) and (self.prefix or not _GROUPS_KEY.match(key))
        }

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
        parts: Parts in the order in which they are clipped; those of a chain share their members, all others are
            disjoint. A parameter in none is not clipped.
    """

    params: tuple[Tensor, ...]
    names: tuple[str, ...]
    groups: tuple[int, ...]
    parts: tuple[Part, ...]

    @cached_property
    def positions(self) -> tuple[int, ...]:
        """Positions of all parameters."""
        return _counted(len(self.params))[0]

    @cached_property
    def limit(self) -> float | None:
        """The limit of every element, where a clamp of all gradients is all there is to do."""
        rule = self.whole.rule if self.whole is not None and len(self.parts) == 1 else None
        return float(rule.limit) if type(rule) is Value else None

    @cached_property
    def whole(self) -> Part | None:
        """The last part, if it and all before it cover every parameter."""
        count = len(self.params)
        whole = self.parts and all(len(part.members) == count for part in self.parts)
        return self.parts[-1] if whole else None

    @cached_property
    def order(self) -> float:
        """Order of the norm that a rule reads anyway, so that one pass serves it and the record."""
        if not self.parts:
            return 2.0
        return float(getattr((self.whole or self.parts[0]).rule, "order", 2.0))


def assign(
    params: Params,
    rule: Rule | float,
    names: Mapping[int, str] | None = None,
    chosen: Callable[[Tensor], bool] | None = None,
) -> Assignment:
    """Divide parameters among `rule` and the rules that parameter groups bring under the key "clip".

    Args:
        params: A tensor, tensors, (name, tensor) pairs, a dict of tensors by name, the `param_groups` of an optimizer,
            or the optimizer or the module itself.
        rule: What clips every parameter whose group says nothing else; a number c means `Value(c)`.
        names: Names by `id` of the parameter.
        chosen: Which parameters to clip at all; None for all.

    Returns:
        The assignment.

    Raises:
        TypeError: A rule lacks one of the three methods, or something is no parameter.

    Example:
        >>> import torch
        >>> w, b = (torch.zeros(2, requires_grad=True) for _ in range(2))
        >>> assign([w, w, b], 1.0).names
        ('0', '1')
    """
    main = as_rule(rule)
    if type(params) is list and chosen is None and not names:
        kept = tuple({id(param): param for param in params}.values())
        if set(map(type, kept)) <= {nn.Parameter}:  # the common case, without what only others need
            members, names_of_all = _counted(len(kept))
            parts = tuple(_stages(main, members)) if members else ()
            return Assignment(kept, names_of_all, (0,) * len(kept), parts)
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
    kept = tuple([param for param, _ in entries.values()])
    _check_parameters(kept)
    clipped = [i for i, param in enumerate(kept) if chosen is None or chosen(param)]
    groups = tuple([group for _, group in entries.values()])
    shown = [known.get(id(param), str(i)) for i, param in enumerate(kept)] if known else ()
    return Assignment(
        params=kept,
        names=tuple(shown or map(str, range(len(kept)))),
        groups=groups,
        parts=_parts(main, overrides, clipped, groups),
    )


def as_rule(rule: Any) -> Rule:
    """Return `rule`, or `Value(rule)` for a number.

    Raises:
        TypeError: `rule` is neither a number nor an object with the methods `init`, `plan` and `clip`.
    """
    if type(rule) in _OWN:  # the common case
        own: Rule = rule
        return own
    if is_number(rule):
        Value(rule)  # whose message shows what was received
        return Value(float(rule))
    if isinstance(rule, str):
        raise ArgumentTypeError(_about_text(rule))
    missing = [name for name in METHODS if not callable(getattr(rule, name, None))]
    if missing or isinstance(rule, type):
        given = (
            f"the class {rule.__name__}, not an instance of it"
            if isinstance(rule, type)
            else (repr(rule) if len(repr(rule)) <= 60 else f"a {type(rule).__name__}")
        )
        lacks = f" (it lacks {', '.join(missing)})" if missing else ""
        raise ArgumentTypeError(
            f"a rule must be a number or an object with the methods init, plan and clip, got {given}{lacks}: "
            "give e.g. 1.0, Norm(1.0) or AGC(0.01)"
        )
    checked: Rule = rule
    return checked


def _about_text(text: str) -> str:
    """Return what to say about a rule that is given as text."""
    try:
        number = float(text)
    except ValueError:
        remedy = "give the rule itself, e.g. Norm(1.0) or AGC(0.01), or a number c for Value(c)"
    else:
        remedy = f"drop the quotes and give {number:g}, which means Value({number:g})"
    methods = "init, plan and clip"
    return (
        f"a rule must be a number or an object with the methods {methods}, got {text!r}: {remedy}"
    )


def _groups(params: Params) -> Sequence[Mapping[str, Any]]:
    """Return parameters of any accepted form as parameter groups."""
    if isinstance(params, Optimizer):
        return params.param_groups
    if isinstance(params, nn.Module):
        return [{"params": list(params.named_parameters())}]
    if isinstance(params, Mapping):
        return [params] if "params" in params else [{"params": list(params.items())}]
    items: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if not items and isinstance(params, Iterator):
        warnings.warn(
            "the iterator of parameters is exhausted, so no gradient is clipped: pass a list, or the module itself",
            stacklevel=4,
        )
    if items and isinstance(items[0], Mapping):
        return items
    return [{"params": items}]


def _check_parameters(tensors: Sequence[Any]) -> None:
    """Refuse what is no tensor, and tensors none of which can have a gradient, such as the gradients themselves."""
    types = set(map(type, tensors))
    if types <= {nn.Parameter}:
        return
    kinds = [tensor for tensor in tensors if not isinstance(tensor, Tensor)]
    if kinds:
        raise ArgumentTypeError(
            f"params must be tensors, (name, tensor) pairs, parameter groups, a module or an optimizer, got "
            f"{type(kinds[0]).__name__}: give e.g. model.parameters()"
        )
    if not any(_has_gradient(tensor) for tensor in tensors):
        raise ArgumentTypeError(
            "params must be parameters, whose .grad is clipped, got tensors without a gradient that require none: "
            "give e.g. model.parameters() instead of the gradients"
        )


def _has_gradient(tensor: Tensor) -> bool:
    """Return whether a tensor has a gradient or may have one; a frozen parameter may have one later."""
    if isinstance(tensor, nn.Parameter) or tensor.requires_grad:
        return True
    return tensor.is_leaf and tensor.grad is not None


def _parts(
    main: Rule, overrides: Mapping[int, Any], clipped: list[int], groups: tuple[int, ...]
) -> tuple[Part, ...]:
    rest = tuple([i for i in clipped if groups[i] not in overrides] if overrides else clipped)
    parts = _stages(main, rest) if rest else []
    for group, override in overrides.items():
        members = tuple(i for i in clipped if groups[i] == group)
        if override is not None and members:
            parts += _stages(as_rule(override), members, f"group{group}.")
    return tuple(parts)


def _stages(rule: Rule, members: tuple[int, ...], prefix: str = "") -> list[Part]:
    """Return one part, or of a chain one for each of its rules, to be carried out in this order."""
    if not isinstance(rule, Chain):
        return [Part(rule, members, prefix)]
    return [Part(each, members, f"{prefix}{i}.") for i, each in enumerate(rule.rules)]


@lru_cache(maxsize=8)
def _counted(count: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the numbers below `count`, and the same as text."""
    numbers = tuple(range(count))
    return numbers, tuple(map(str, numbers))
