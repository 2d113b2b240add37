"""Names that a configuration may use, and the one that is nearest to what was written."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

_FEW = 12  # options that are listed where none is near


def short(path: str) -> str:
    """Return a class's name without its module."""
    return path.rpartition(".")[2]


def meant(name: str, known: Iterable[str]) -> str:
    """Return the known name that is nearest, as a question; where none is near, all of a few."""
    known = list(known)
    lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), lower, n=1) or [
        one for one in lower if one in name.lower() or name.lower() in one.split("_")
    ]
    if close:
        return f" Did you mean {lower[close[0]]!r}?"
    return f" It has {', '.join(known)}." if 0 < len(known) <= _FEW else ""


def readable(types: str) -> str:
    """Return types as a reader knows them.

    >>> readable("[<class 'int'>, typing.Literal['auto']]")
    "int or 'auto'"
    """
    plain = re.sub(r"<class '([^']+)'>", lambda found: short(found[1]), types.strip())
    parts = (
        re.sub(r"typing\.Literal\[([^]]*)\]", r"\1", plain)
        .removeprefix("[")
        .removesuffix("]")
        .split(", ")
    )
    named = [
        "null" if part == "NoneType" else re.sub(r"\b[a-z_]+(\.\w+)*\.(\w+)", r"\2", part)
        for part in parts
    ]
    return " or ".join(", ".join(named).rsplit(", ", 1))


def parameters(owner: Any) -> tuple[str, ...]:
    """Return the names of what a class, or the path of one, takes."""
    if isinstance(owner, str):
        module, _, name = owner.rpartition(".")
        owner = getattr(import_module(module), name)
    return tuple(inspect.signature(owner).parameters)


def annotation(owner: str, name: str) -> str:
    """Return what an option of a class must be, in words; empty where the class does not say.

    >>> annotation("clipquant.QuantizeOnFitEnd", "export")
    'list[str | Format] or null'
    """
    module, _, attribute = owner.rpartition(".")
    held = inspect.signature(getattr(import_module(module), attribute)).parameters.get(name)
    said = "" if held is None else held.annotation
    if not isinstance(said, str) or not said:
        return ""
    plain = re.sub(r"Literal\[([^]]*)\]", lambda found: found[1].replace(", ", " | "), said)
    parts = re.sub(r"\bNone\b", "null", plain).replace('"', "'")
    depth, cut = 0, []
    for sign in parts:  # only the bars outside of brackets part one kind from the next
        depth += (sign == "[") - (sign == "]")
        cut.append("\n" if sign == "|" and depth == 0 else sign)
    kinds = [part.strip() for part in "".join(cut).split("\n")]
    return " or ".join(", ".join(kinds).rsplit(", ", 1))


def names_in(module: str) -> tuple[str, ...]:
    """Return the classes of a module; none where it cannot be imported."""
    try:
        held = vars(import_module(module))
    except ImportError:
        return ()
    return tuple(name for name, value in held.items() if isinstance(value, type))


def classes() -> tuple[str, ...]:
    """Return the short names that a configuration knows: this package's and Lightning's callbacks and loggers."""
    import lightning.pytorch.callbacks as callbacks
    import lightning.pytorch.loggers as loggers

    import clipquant
    from clipquant import clip, reference

    homes = (clip, reference, callbacks, loggers)
    found = (one for home in homes for one in vars(home).items())
    return (*clipquant.__all__, *(name for name, value in found if isinstance(value, type)))
