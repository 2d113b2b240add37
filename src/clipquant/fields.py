"""JSON from strangers: bounded before it is parsed, and read field by field, each of one kind and in its range."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Sequence
from typing import Any, TypeVar

from clipquant.errors import ArgumentError

DEPTH = 64
LONGEST = 4096  # characters of a name or a note
MOST = 2**63 - 1
_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_Choice = TypeVar("_Choice")


class FieldError(ArgumentError):
    """A field that cannot be: its place, the rule and what stands there."""


def fault(at: str, rule: str, value: object) -> FieldError:
    """Return the error of a field.

    Args:
        at: Its place, such as "tensors.fc.weight.bits".
        rule: What it must be.
        value: What it is.
    """
    return FieldError(f"{at} must be {rule}; got {reprlib.repr(value)[:120]}.")


def whole(value: Any, at: str, least: int = 0, most: int = MOST) -> int:
    """Return a whole number between two others, both included.

    >>> whole("4", "bits", 1, 8)
    Traceback (most recent call last):
    ...
    clipquant.fields.FieldError: bits must be a whole number from 1 to 8; got '4'.
    """
    if type(value) is not int or not least <= value <= most:
        raise fault(at, f"a whole number from {least} to {most}", value)
    return value


def number(value: Any, at: str) -> float:
    """Return a finite number."""
    if type(value) not in (int, float) or not math.isfinite(value):
        raise fault(at, "a finite number", value)
    return float(value)


def text(value: Any, at: str, most: int = LONGEST) -> str:
    """Return text that can be written as UTF-8, of at most so many characters."""
    if not isinstance(value, str) or len(value) > most:
        raise fault(at, f"text of at most {most} characters", value)
    if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
        raise fault(at, "text without lone surrogates", value)
    return value


def flag(value: Any, at: str) -> bool:
    """Return true or false."""
    if type(value) is not bool:
        raise fault(at, "true or false", value)
    return value


def items(value: Any, at: str, length: int | None = None) -> list[Any]:
    """Return a list, of one length where that is given."""
    if not isinstance(value, list) or length not in (None, len(value)):
        raise fault(at, "a list" if length is None else f"a list of {length}", value)
    return value


def entries(value: Any, at: str) -> dict[str, Any]:
    """Return an object whose names are text."""
    if not isinstance(value, dict):
        raise fault(at, "an object", value)
    for name in value:
        text(name, f"a name in {at}")
    return value


def shape(value: Any, at: str, most_dims: int = 32) -> tuple[int, ...]:
    """Return a shape whose elements, those of empty axes left out, can be counted in 62 bits."""
    sides = tuple(whole(side, at) for side in items(value, at))
    if len(sides) > most_dims or math.prod(max(side, 1) for side in sides) >= 2**62:
        raise fault(at, f"a shape of at most {most_dims} axes and 2**62 elements", value)
    return sides


def one_of(value: Any, at: str, choices: dict[str, _Choice]) -> _Choice:
    """Return what a name stands for."""
    if not isinstance(value, str) or value not in choices:
        raise fault(at, f"one of {', '.join(choices)}", value)
    return choices[value]


def read_json(data: bytes, at: str, room: int) -> Any:
    """Return the value of a JSON text of little depth, whose objects take no more memory than allowed.

    Args:
        data: UTF-8.
        at: What it is, for errors.
        room: Most bytes that its objects may take, as estimated from its brackets, commas and quotes.

    Raises:
        FieldError: If it is too large, too deep, names an entry twice, or is no JSON.

    >>> read_json(b'{"a": [1, 2.5]}', "it", 10_000)
    {'a': [1, 2.5]}
    """
    _check_room(data, at, room)
    try:
        return json.loads(
            data.decode("utf-8"),
            object_pairs_hook=lambda pairs: _once(pairs, at),
            parse_int=lambda digits: _parse_int(digits, at),
            parse_constant=lambda name: _refuse_constant(name, at),
        )
    except FieldError:
        raise
    except (ValueError, RecursionError) as error:
        raise FieldError(f"{at} is no JSON: {error}.") from error


def _check_room(data: bytes, at: str, room: int) -> None:
    need = 4 * len(data) + 50 * data.count(b'"')
    if need <= room:
        # Every second piece between quotes, escaped ones left out, stands outside of strings.
        pieces: Sequence[bytes] = data.replace(rb"\\", b"").replace(rb"\"", b"").split(b'"')
        outside = b"".join(pieces[::2])
        counts = {b"{": 240, b"[": 80, b",": 64, b":": 64}
        need += sum(size * outside.count(sign) for sign, size in counts.items())
        if need <= room:
            _check_depth(outside.translate(None, _BRACKETS), at)
            return
    raise FieldError(
        f"{at} would take {need:,} bytes in memory; for a file of this size it may take {room:,}."
    )


def _check_depth(brackets: bytes, at: str) -> None:
    depth = 0
    for sign in brackets:
        depth += 1 if sign in b"[{" else -1
        if depth > DEPTH:
            raise FieldError(f"{at} is nested deeper than {DEPTH} levels.")


def _once(pairs: list[tuple[str, Any]], at: str) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise FieldError(f"{at} names an entry twice.")
    return found


def _parse_int(digits: str, at: str) -> int:
    if len(digits) > 20:
        raise fault(at, "of numbers of at most 20 digits", digits[:40])
    return int(digits)


def _refuse_constant(name: str, at: str) -> Any:
    raise fault(at, "of finite numbers", name)
