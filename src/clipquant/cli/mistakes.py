"""What is wrong in a configuration, in one line: the class, the option, the value and the closest name."""

from __future__ import annotations

import ast
import re

from clipquant.cli.names import annotation, classes, meant, names_in, parameters, readable, short
from clipquant.keywords import OF_QUANTIZING

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
_REQUIRED = re.compile(r"arguments are required: (?:\w+\.)?(\S+)")


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
    kinds = (
        _of_file,
        _of_option,
        _of_class,
        _of_key,
        _of_module,
        _of_indent,
        _of_value,
        _of_missing,
    )
    for kind in kinds:
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
    owner, takes = short(before[-1]), parameters(before[-1])
    return (
        f"{owner} has no option {found[1]!r}.{_called(owner, found[1]) or meant(found[1], takes)}"
    )


def _called(owner: str, name: str) -> str:
    """Return what an option that other libraries have is called here; empty where that is not known."""
    from clipquant.callbacks.clip_keywords import (
        RULES,  # brings Lightning, which a plain --help does without
    )

    if owner == "GradientClipCallback" and name in RULES:
        return f" What clips is its option rule: {RULES[name].replace('{}', '...')}."
    here = OF_QUANTIZING.get(name, "") if owner == "QuantizeOnFitEnd" else ""
    option = here.split("=", 1)[0]
    taken = option in parameters("clipquant.QuantizeOnFitEnd")
    return f" Did you mean {option!r}?" if here and taken else ""


def _of_class(message: str) -> str:
    found = _UNKNOWN_CLASS.search(message)
    if found is None:
        return ""
    remedy = (
        meant(found[1], classes())
        or " A class of your own is named by its import path: module.Class."
    )
    return f"{_place(message)}no class is named {found[1]!r}.{remedy}"


def _of_key(message: str) -> str:
    found = _UNKNOWN_KEY.search(message)
    if found is None:
        return ""
    from lightning.pytorch import Trainer

    *parents, name = found[2].split(".")
    takes = parameters(Trainer) if parents == ["trainer"] else ()
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
    return f"{found[1]} has no option {found[2]!r}.{meant(name, takes)}"


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
    return f"{_place(message)}{module} has no {name!r}.{meant(name, names_in(module))}"


def _of_missing(message: str) -> str:
    found = _REQUIRED.search(message)
    if found is None:
        return ""
    return f"{found[1]} is missing: pass a configuration that names it, --config FILE, or --{found[1]} CLASS."


def _of_indent(message: str) -> str:
    """Return which options stand beside init_args and not below it."""
    for text in _VALUE.findall(message):
        try:
            given = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            continue
        beside = [*given] if isinstance(given, dict) and "class_path" in given else []
        beside = [name for name in beside if name not in ("class_path", "init_args", "dict_kwargs")]
        if beside:
            return (
                f"{short(str(given['class_path']))}: {', '.join(beside)} must stand below init_args; got it beside. "
                "Indent it further."
            )
    return ""


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
    if not owner:
        return f"{key[1]} must be {readable(types[0])}; got {values[1]}."
    kind = annotation(owner[-1], key[1]) or readable(types[0])
    listed = "list[" in kind and not values[1].startswith(("[", "{"))
    remedy = f" Write [{values[1]}]." if listed else ""
    return f"{short(owner[-1])}: {key[1]} must be {kind}; got {values[1]}.{remedy}"


def _deepest(lines: list[str]) -> str:
    kept = [line for line in lines if line.strip() and not _VALUE.search(line)]
    return max(kept, key=_indent).strip(" -") if kept else "the configuration cannot be read."


def _place(message: str) -> str:
    keys = _KEY.findall(message)
    return f"{keys[-1]}: " if keys else ""


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())
