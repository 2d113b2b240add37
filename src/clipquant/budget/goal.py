"""What is asked of a file, and what cannot be."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from clipquant.errors import ArgumentError

Metrics = Mapping[str, float]
_LEAST = 1000  # bytes: what a float from 1 up to here means is anybody's guess
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class BudgetError(ArgumentError):
    """A budget that cannot be met, or cannot be judged: says what is missing."""


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Args:
        max_drop: Most that the monitored metric may lose.
        max_size: Most bytes of the file.
        monitor: The metric.
        mode: Whether it is better when smaller ("min") or larger ("max").
        confidence: How sure it must be that the true drop is within `max_drop`; None: the drop measured and one
            standard error must be.
    """

    max_drop: float | None
    max_size: int | None
    monitor: str
    mode: str
    confidence: float | None = None


def check_budget(max_drop: object, max_size: object) -> None:
    """Raise unless the two budgets are such as can be asked for.

    >>> check_budget(-0.1, None)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: max_drop must be a finite number, 0 or more, in the units of the monitored metric; \
got -0.1.
    """
    if max_drop is not None and (
        isinstance(max_drop, bool)
        or not isinstance(max_drop, (int, float))
        or not 0 <= max_drop < math.inf
    ):
        hint = " Leave out the quotes." if isinstance(max_drop, str) else ""
        raise ArgumentError(
            "max_drop must be a finite number, 0 or more, in the units of the monitored metric; "
            f"got {max_drop!r}.{hint}"
        )
    if max_size is not None:
        size_in_bytes(max_size, 2**62)


def check_confidence(confidence: object, max_drop: object) -> None:
    """Raise unless a confidence is one, and there is a drop that it is about.

    >>> check_confidence(95, 0.01)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: confidence must be a number above 0.5 and below 1, such as 0.95; got 95.
    """
    if confidence is None:
        return
    number = isinstance(confidence, (int, float)) and not isinstance(confidence, bool)
    if not number or not 0.5 < float(confidence) < 1:  # type: ignore[arg-type]
        raise ArgumentError(
            f"confidence must be a number above 0.5 and below 1, such as 0.95; got {confidence!r}."
        )
    if max_drop is None:
        raise ArgumentError(
            "confidence says how sure it must be that max_drop is kept, with bits='auto'; got "
            f"confidence={confidence!r} without max_drop. Give max_drop, or leave confidence out."
        )


def size_in_bytes(max_size: object, float_bytes: int) -> int:
    """Return a size budget in bytes.

    Args:
        max_size: A whole number of bytes, a share of the float size between 0 and 1, or a text as
            "300kB", "300 kb", "2k", "1.5 MB" (powers of 1000), "10KiB" or "2 MiB" (of 1024). A float below 1
            is a share, one of 1000 or more bytes; what lies between is refused.
        float_bytes: Bytes of the float model.

    Raises:
        ValueError: For anything else, quoting it.

    >>> size_in_bytes("300 kb", 0), size_in_bytes(0.25, 1000), size_in_bytes("2 MiB", 0)
    (300000, 250, 2097152)
    """
    if isinstance(max_size, str):
        text = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", max_size, re.IGNORECASE)
        size = 0 if text is None else int(float(text[1]) * _UNITS[(text[2] or "").lower()])
        if size > 0:
            return size
    elif isinstance(max_size, int) and not isinstance(max_size, bool) and max_size > 0:
        return max_size
    elif isinstance(max_size, float) and 0 < max_size < 1:
        return int(max_size * float_bytes)
    elif isinstance(max_size, float) and max_size >= _LEAST and max_size.is_integer():
        return int(max_size)
    elif isinstance(max_size, float) and max_size.is_integer() and max_size > 0:
        raise ArgumentError(
            f"max_size={max_size} is neither a share of the float size, which is below 1, nor a size in bytes that a "
            f"file could have. Write '{max_size:g} kB' or '{max_size:g} MB', a share such as 0.25, or a whole "
            "number of bytes."
        )
    raise ArgumentError(
        "max_size must be a whole number of bytes, a share of the float size between 0 and 1, or a "
        f"text as '300kB' or '1.5 MB'; got {max_size!r}.{_as_share(max_size)}"
    )


def _as_share(max_size: object) -> str:
    """Return how a percentage is written."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%\s*", str(max_size))
    return f" Write {max_size!r} as {float(found[1]) / 100:g}." if found else ""


def refuse_below(max_size: int, smallest: int) -> None:
    """Raise for a size budget below the smallest possible file.

    >>> refuse_below(100, 5_300)
    Traceback (most recent call last):
    ...
    clipquant.budget.goal.BudgetError: max_size=100 bytes is below the smallest possible file, 5,300 bytes \
with 0 bits for every row (scales, tensors left in float and metadata remain). Ask for more, or quantize more of \
the model.
    """
    if max_size < smallest:
        raise BudgetError(
            f"max_size={max_size:,} bytes is below the smallest possible file, {smallest:,} bytes with 0 "
            "bits for every row (scales, tensors left in float and metadata remain). Ask for more, or "
            "quantize more of the model."
        )


def spare_bytes(weights: int, metrics: Metrics, most: int | None = None) -> int:
    """Return the bytes to leave in a file for what it will say of the search and its outcome.

    Args:
        weights: How many are quantized.
        metrics: Those of the float model.
        most: Most bytes of the file: what it says of single weights and trials is left out of it where that
            would cost a hundredth. None: no limit.
    """
    details = 400 + 10 * weights
    told = 400 + 3 * len(str(dict(metrics)))
    return told + (details if most is None else min(details, most // 100))


def missed_size(goal: Goal, size: int) -> str:
    """Return why a file of this size misses the goal; empty where it does not.

    >>> missed_size(Goal(0.1, 300, "acc", "max"), 400)
    'max_drop=0.1 needs 400 bytes, more than max_size=300'
    """
    if goal.max_size is None or size <= goal.max_size:
        return ""
    return f"max_drop={goal.max_drop or 0:g} needs {size:,} bytes, more than max_size={goal.max_size:,}"
