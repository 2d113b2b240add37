"""What a rule's arguments are checked for."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from clipquant.errors import ArgumentError


def is_number(value: Any) -> bool:
    """Return whether `value` is a real number, of Python or of numpy; a truth value is none.

    Example:
        >>> is_number(0.5), is_number(True), is_number("0.5")
        (True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def is_count(value: Any) -> bool:
    """Return whether `value` is a whole number, of Python or of numpy; a truth value is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_number(
    rule: str,
    name: str,
    value: Any,
    *,
    low: float | None = None,
    above: float | None = None,
    hint: str,
) -> None:
    """Check that `value` is a number in range.

    Raises:
        ValueError: It is not; the message names the rule, the value and what to give instead.
    """
    bound = f">= {low:g}" if low is not None else f"> {above:g}"
    if is_number(value) and (value >= low if low is not None else value > above):
        return
    hint = "drop the quotes" if _is_quoted(value) else hint
    raise ArgumentError(f"{rule}: {name} must be a number {bound}, got {value!r}: {hint}")


def _is_quoted(value: Any) -> bool:
    """Return whether a text holds a number."""
    try:
        return isinstance(value, str) and float(value) == float(value)
    except ValueError:
        return False


def check_count(rule: str, name: str, value: Any, *, low: int) -> None:
    """Check that `value` is a whole number of at least `low`.

    Raises:
        ValueError: It is not.
    """
    if not is_count(value) or value < low:
        raise ArgumentError(f"{rule}: {name} must be a whole number >= {low}, got {value!r}")


def check_share(rule: str, name: str, value: float) -> None:
    """Check that `value` is a number in [0, 1).

    Raises:
        ValueError: It is not.
    """
    check_number(
        rule, name, value, low=0.0, hint="the share that stays from step to step, e.g. 0.97"
    )
    if value >= 1:
        raise ArgumentError(
            f"{rule}: {name} must be below 1, got {value!r}: with 1 the statistics would never move"
        )
