"""Keywords that GradientClipCallback does not have, and what the same is called here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from difflib import get_close_matches
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from clipquant.errors import ArgumentTypeError

P = ParamSpec("P")
T = TypeVar("T")

# What other libraries call the limit, and the rule that it is here; {} stands for the value received.
_NORM, _VALUE, _EITHER = (
    "Norm({})",
    "Value({})",
    "Norm({}) to limit the norm or Value({}) each element",
)
_RULES = {
    **dict.fromkeys(("max_norm", "norm", "max_grad_norm", "clip_norm", "grad_norm"), _NORM),
    **dict.fromkeys(("clip_grad_norm", "global_clipnorm", "clipnorm", "grad_clip_norm"), _NORM),
    **dict.fromkeys(
        ("value", "limit", "clip_value", "clipvalue", "max_value", "threshold"), _VALUE
    ),
    **dict.fromkeys(("clip_val", "gradient_clip_val", "grad_clip", "clip", "max"), _EITHER),
    **dict.fromkeys(("clip_factor", "clipping_threshold", "clip_ratio", "ratio"), "AGC({})"),
    "norm_type": "Norm(1.0, norm_type={})",
    "percentile": "AutoClip({})",
    "z": "ZClip(z={})",
    "gradient_clip_algorithm": 'Norm(1.0) for "norm" or Value(1.0) for "value"',
    "error_if_nonfinite": 'no rule but on_nonfinite="raise"',
    "error_on_nan": 'no rule but on_nonfinite="raise"',
}


def naming_remedies(
    init: Callable[Concatenate[T, P], None],
) -> Callable[Concatenate[T, P], None]:
    """Make a constructor say what an unknown keyword is called here; its signature stays."""

    @wraps(init)
    def checked(self: T, *args: P.args, **kwargs: P.kwargs) -> None:
        known = list(inspect.signature(init).parameters)[1:]
        for name, value in kwargs.items():
            if name not in known:
                raise ArgumentTypeError(_unknown(type(self).__name__, name, value, known))
        init(self, *args, **kwargs)

    return cast("Callable[Concatenate[T, P], None]", checked)


def _unknown(owner: str, name: str, value: Any, known: list[str]) -> str:
    """Return what to say about a keyword that is none of those known.

    Example:
        >>> _unknown("GradientClipCallback", "max_norm", 1.0, ["rule"])
        'GradientClipCallback has no argument max_norm=1.0: what clips is its first argument, give Norm(1.0)'
    """
    said = f"{owner} has no argument {name}={value!r}"
    if name in _RULES:
        rule = _RULES[name].replace("{}", repr(value))
        return f"{said}: what clips is its first argument, give {rule}"
    near = get_close_matches(name, known, 1)
    meant = f"give {near[0]}={value!r}" if near else f"its arguments are {', '.join(known)}"
    return f"{said}: {meant}"
