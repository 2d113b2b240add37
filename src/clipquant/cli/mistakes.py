"""What is wrong in a configuration, in one line: the class, the option, the value and the closest name."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from typing import Any

_CLASS = re.compile(r"Problem with given class_path '([^']+)'")
_UNKNOWN_OPTION = re.compile(r"Option '([^']+)' is not accepted")
_UNKNOWN_CLASS = re.compile(r"Expected a dot import path string: (\S+)")
_NO_FILE = re.compile(r"File does not exist: '?([^'\n]+)")
_UNKNOWN_KEY = re.compile(r"Subcommand '(\w+)' does not accept option '([^']+)'")
_NO_MODULE = re.compile(r"No module named '([^']+)'")
_NO_NAME = re.compile(r"(?:module|type object) '([^']+)' has no attribute '([^']+)'")
_KEY = re.compile(r'Parser key "([^"]+)"')
_TYPES = re.compile(r"(?:Expected an?|Subtypes:) (.+?)(?:\. Got value: .*)?$", re.MULTILINE)
_VALUE = re.compile(r"(?:Given|Got) value: (.+)")


def told(message: str) -> str:
    """Return what a message of jsonargparse comes to, as one line.

    The message lists every type that was tried, one inside the other; what the user has to change stands where it is
    deepest. A message of a kind that is not known is given by its own deepest line.

    Args:
        message: The text of the error, of any number of lines.

    >>> told('''Parser key "trainer.callbacks":
    ...   Errors:
    ...     - Problem with given class_path 'clipquant.QuantizeOnFitEnd':
    ...         Option 'nbits' is not accepted''')
    "QuantizeOnFitEnd has no option 'nbits'. Did you mean 'bits'?"
    """
    for kind in (_of_file, _of_option, _of_class, _of_key, _of_module, _of_value):
        line = kind(message)
        if line:
            return line
    return " ".join(message.split()) if len(message) <= 200 else _deepest(message.splitlines())


def _of_file(message: str) -> str:
    found = _NO_FILE.search(message)
    return (
        f"there is no file {found[1]!r}. Pass the path of a YAML file: --config FILE."
        if found
        else ""
    )


def _of_option(message: str) -> str:
    found = _UNKNOWN_OPTION.search(message)
    if found is None:
        return ""
    before = _CLASS.findall(message[: found.start()])
    if not before:
        return f"there is no option {found[1]!r}."
    takes = _parameters(before[-1])
    return f"{_short(before[-1])} has no option {found[1]!r}.{_meant(found[1], takes)}"


def _of_class(message: str) -> str:
    found = _UNKNOWN_CLASS.search(message)
    if found is None:
        return ""
    remedy = (
        _meant(found[1], _classes())
        or " A class of your own is named by its import path: module.Class."
    )
    return f"{_place(message)}no class is named {found[1]!r}.{remedy}"


def _of_key(message: str) -> str:
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    from lightning.pytorch import Trainer

    *parents, name = found[2].split(".")
    takes = _parameters(Trainer) if parents == ["trainer"] else ()
    if not parents:
        takes = (
            "trainer",
            "model",
            "data",
            "optimizer",
            "lr_scheduler",
            "seed_everything",
            "ckpt_path",
        )
    return f"{found[1]} has no option {found[2]!r}.{_meant(name, takes)}"


def _of_module(message: str) -> str:
    found = _NO_MODULE.search(message)
    if found is not None:
        return (
            f"{_place(message)}no module is named {found[1]!r}. Run where {found[1].split('.')[0]}.py lies, "
            "or set PYTHONPATH."
        )
    found = _NO_NAME.search(message)
    if found is None:
        return ""
    module, name = found.groups()
    return f"{_place(message)}{module} has no {name!r}.{_meant(name, _names_in(module))}"


def _of_value(message: str) -> str:
    """Return the deepest option that a value does not suit."""
    lines = message.splitlines()
    at = [i for i, line in enumerate(lines) if _KEY.search(line)]
    if not at:
        return ""
    deepest = max(at, key=lambda i: _indent(lines[i]))
    inner = "\n".join(lines[deepest:])
    key = _KEY.search(lines[deepest])
    values, types = _VALUE.search(inner), _TYPES.findall(inner)
    if key is None or values is None or not types:
        return ""
    owner = _CLASS.findall("\n".join(lines[:deepest]))
    whose = f"{_short(owner[-1])}: " if owner else ""
    return f"{whose}{key[1]} must be {_readable(types[0])}; got {values[1]}."


def _deepest(lines: list[str]) -> str:
    kept = [line for line in lines if line.strip() and not _VALUE.search(line)]
    return max(kept, key=_indent).strip(" -") if kept else "the configuration cannot be read."


def _place(message: str) -> str:
    keys = _KEY.findall(message)
    return f"{keys[-1]}: " if keys else ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _short(path: str) -> str:
    return path.rpartition(".")[2]


def _meant(name: str, known: Iterable[str]) -> str:
    lower = {one.lower(): one for one in known}
    close = get_close_matches(name.lower(), lower, n=1) or [
        one for one in lower if one in name.lower()
    ]
    return f" Did you mean {lower[close[0]]!r}?" if close else ""


def _readable(types: str) -> str:
    """Return types as a reader knows them.

    >>> _readable("[<class 'int'>, typing.Literal['auto']]")
    "int or 'auto'"
    """
    plain = re.sub(r"<class '([^']+)'>", lambda found: _short(found[1]), types.strip())
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


def _parameters(owner: Any) -> tuple[str, ...]:
    if isinstance(owner, str):
        module, _, name = owner.rpartition(".")
        owner = getattr(import_module(module), name)
    return tuple(inspect.signature(owner).parameters)


def _names_in(module: str) -> tuple[str, ...]:
    try:
        held = vars(import_module(module))
    except ImportError:
        return ()
    return tuple(name for name, value in held.items() if isinstance(value, type))


def _classes() -> tuple[str, ...]:
    """Return the short names that a configuration knows: this package's and Lightning's callbacks and loggers."""
    import lightning.pytorch.callbacks as callbacks
    import lightning.pytorch.loggers as loggers

    import clipquant
    from clipquant import clip, reference

    homes = (clip, reference, callbacks, loggers)
    found = (one for home in homes for one in vars(home).items())
    return (*clipquant.__all__, *(name for name, value in found if isinstance(value, type)))
