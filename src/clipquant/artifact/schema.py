"""What a file's header may say: parsed once, between digest and use, into records that hold no nonsense."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clipquant.artifact.entries import FLOATS, Entry, paid
from clipquant.fields import FieldError, entries, fault, flag, items, one_of, shape, text, whole
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.weights import LeftInFloat
from clipquant.stored import StoredReport, read_stored

PARTS = ("q", "scale", "zero", "bits")
CODING = "range"  # what the record of a weight says whose codes are an adaptive range coder's
# Versions of the format that files are written in: without such a weight, and with one.
DENSE_VERSION, CODED_VERSION = 2, 3
_GROUPS = 1 << 20  # of a weight whose channels are its first axis: they mean nothing there


@dataclass(frozen=True)
class Weight:
    """One quantized weight.

    Args:
        bits: Width of a code, 1 to 8; None: each row has its own, in the tensor NAME.bits.
        levels: Steps of the grid; None where rows differ.
        group_size: Neighbouring columns that share a scale.
        layout: How the matrix of codes folds back into the weight.
        dtype: Floating dtype of the weight.
        method: What chose the codes.
        coded: Whether NAME.q is a stream of `clipquant.quant.codes.entropy`; else the codes are dense.
    """

    bits: int | None
    levels: int | None
    group_size: int
    layout: Layout
    dtype: torch.dtype
    method: str
    coded: bool = False


@dataclass(frozen=True)
class Manifest:
    """All that a file says of itself.

    Args:
        format_version: Of the file.
        sha256: Of the whole file, this digest blanked.
        entries: Key -> tensor of the file.
        weights: State-dict key -> quantized weight; its codes are the tensor NAME.q.
        aliases: Key of a tied tensor -> the key under which it is held.
        left: What stays in float, and why.
        lookups: Keys of quantized weights that are looked up.
        versions: Package -> version that wrote the file.
        report: What it says of how it was made; None: nothing.
    """

    format_version: int
    sha256: str
    entries: Mapping[str, Entry]
    weights: Mapping[str, Weight]
    aliases: Mapping[str, str]
    left: tuple[LeftInFloat, ...]
    lookups: frozenset[str]
    versions: Mapping[str, str]
    report: StoredReport | None

    @property
    def floats(self) -> dict[str, Entry]:
        """The tensors of the file that are not parts of quantized weights."""
        parts = {f"{name}.{part}" for name in self.weights for part in PARTS}
        return {name: entry for name, entry in self.entries.items() if name not in parts}

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """State-dict key -> shape, tied ones included."""
        held = {name: weight.layout.shape for name, weight in self.weights.items()}
        held |= {name: entry.shape for name, entry in self.floats.items()}
        return held | {alias: held[name] for alias, name in self.aliases.items()}


def oldest_version(about: Mapping[str, Any]) -> int:
    """Return the format that a file is written in: the oldest that has what its records say.

    >>> oldest_version({"tensors": {"w": {"bits": 4}}}), oldest_version({"tensors": {"w": {"coding": CODING}}})
    (2, 3)
    """
    named = about.get("tensors", {}).values()
    return CODED_VERSION if any("coding" in said for said in named) else DENSE_VERSION


def read_manifest(about: Mapping[str, Any], held: Mapping[str, Entry]) -> Manifest:
    """Return the records of a file's JSON object, each field checked against the tensors of the file.

    Args:
        about: The JSON object.
        held: The tensors of the file.

    Raises:
        FieldError: Naming the field that cannot be.
    """
    named = entries(about.get("tensors"), "tensors")
    version = whole(about.get("format_version"), "format_version", 1)
    weights = {name: _read_weight(name, value, held, version) for name, value in named.items()}
    parts = {f"{name}.{part}" for name in weights for part in PARTS}
    for name in weights.keys() & held.keys() | weights.keys() & parts:
        raise FieldError(f"tensors.{name} must have a name of its own; another tensor has it.")
    keys = weights.keys() | (held.keys() - parts)
    report = about.get("report")
    return Manifest(
        version,
        text(about.get("sha256"), "sha256", 64),
        held,
        weights,
        _read_aliases(about.get("aliases"), keys),
        tuple(_read_left(value) for value in items(about.get("left"), "left")),
        frozenset(_read_lookups(about.get("lookups", []), weights)),
        {
            name: text(said, f"versions.{name}")
            for name, said in entries(about.get("versions"), "versions").items()
        },
        None if report is None else read_stored(report, about.get("details")),
    )


def _read_aliases(value: Any, keys: set[str]) -> dict[str, str]:
    """Return tied keys; what they name is held itself, so that they form no chain and no cycle."""
    aliases = entries(value, "aliases")
    for alias, name in aliases.items():
        if not isinstance(name, str) or name not in keys:
            raise fault(f"aliases.{alias}", "the key of a tensor that the file holds", name)
        if alias in keys:
            raise FieldError(f"aliases.{alias} must not be a key of its own; the file holds it.")
    return aliases


def _read_lookups(value: Any, weights: Mapping[str, Weight]) -> list[str]:
    names = items(value, "lookups")
    for name in names:
        if not isinstance(name, str) or name not in weights:
            raise fault("lookups", "keys of quantized weights", name)
    return list(names)


def _read_left(value: Any) -> LeftInFloat:
    name, size, why = items(value, "left", 3)
    return LeftInFloat(text(name, "left"), whole(size, "left"), text(why, "left"))


def _read_weight(name: str, value: Any, held: Mapping[str, Entry], version: int) -> Weight:
    at = f"tensors.{name}"
    about = entries(value, at)
    layout = _read_layout(about, at)
    by_rows = f"{name}.bits" in held
    width = about.get("bits")
    if by_rows is not (width == "rows"):
        raise fault(f"{at}.bits", "'rows' where, and only where, the file has a .bits", width)
    bits = None if by_rows else whole(width, f"{at}.bits", 1, MAX_BITS)
    levels = about.get("levels")
    if bits is not None:
        most = 2**bits - 1
        levels = most if levels is None else whole(levels, f"{at}.levels", 1, most)
    elif levels is not None:
        raise fault(f"{at}.levels", "left out where rows have bits of their own", levels)
    size = _read_group_size(about.get("granularity", "channel"), layout, at)
    coded = _read_coding(about, at, version)
    _check_parts(name, about, layout, None if coded else bits, size, held)
    if bits is None:
        _check_part(f"{name}.bits", held, (torch.uint8,), ((layout.rows,),))
    dtype = one_of(about.get("dtype", "float32"), f"{at}.dtype", FLOATS)
    method = text(about.get("method", "rtn"), f"{at}.method", 100)
    return Weight(bits, levels, size, layout, dtype, method, coded)


def _read_coding(about: Mapping[str, Any], at: str, version: int) -> bool:
    coding = about.get("coding")
    if coding is None:
        return False
    if version < CODED_VERSION or coding != CODING:
        rule = f"left out, or in files of format_version {CODED_VERSION} {CODING!r}"
        raise fault(f"{at}.coding", rule, coding)
    return True


def _read_layout(about: Mapping[str, Any], at: str) -> Layout:
    form = paid(shape(about.get("shape"), f"{at}.shape"), f"{at}.shape")
    axis = whole(about.get("axis", 0), f"{at}.axis", -2, 1)
    least = 3 if axis < 0 else axis + 1  # of a stack, one axis more than its matrices have
    if len(form) < least:
        raise fault(f"{at}.shape", f"of {least} axes or more", form)
    if axis < 0 and 0 in form:
        raise fault(f"{at}.shape", "of axes of 1 or more", form)
    most = max(form[0], 1) if axis == 1 else 1 if axis < 0 else _GROUPS
    groups = whole(about.get("groups", 1), f"{at}.groups", 1, most)
    if axis == 1 and form[0] % groups:
        raise fault(f"{at}.groups", f"a divisor of {form[0]}", groups)
    return Layout(form, axis, groups)


def _read_group_size(value: Any, layout: Layout, at: str) -> int:
    if value in ("tensor", "channel"):
        return layout.columns
    return whole(value, f"{at}.granularity", 1, max(layout.columns, 1))


def _check_parts(
    name: str,
    about: Mapping[str, Any],
    layout: Layout,
    bits: int | None,
    size: int,
    held: Mapping[str, Entry],
) -> None:
    """Raise unless a weight's codes, scales and zeros have the shapes that its record asks for.

    Only codes that are dense and of one width have a length that follows from it.
    """
    rows, columns = layout.rows, layout.columns
    _check_part(f"{name}.q", held, (torch.uint8,), None)
    if bits is not None:
        wanted = (rows * columns * bits + 7) // 8
        if held[f"{name}.q"].shape != (wanted,):
            raise fault(f"{name}.q", f"{wanted} bytes", held[f"{name}.q"].shape)
    groups = -(-columns // size) if size else 0
    forms = tuple((count, groups) for count in {rows, 1})
    _check_part(f"{name}.scale", held, tuple(FLOATS.values()), forms)
    if about.get("symmetric") is not None:
        symmetric = flag(about["symmetric"], f"tensors.{name}.symmetric")
        if symmetric is (f"{name}.zero" in held):
            raise fault(f"tensors.{name}.symmetric", "true without a .zero, else false", symmetric)
    if f"{name}.zero" in held:
        scale = held[f"{name}.scale"]
        _check_part(f"{name}.zero", held, (scale.dtype,), (scale.shape,))


def _check_part(
    name: str,
    held: Mapping[str, Entry],
    dtypes: Sequence[torch.dtype],
    forms: tuple[tuple[int, ...], ...] | None,
) -> None:
    entry = held.get(name)
    if entry is None:
        raise FieldError(f"{name} must stand in the file; it does not.")
    if entry.dtype not in dtypes:
        raise fault(f"{name}.dtype", f"one of {', '.join(map(str, dtypes))}", str(entry.dtype))
    if forms is None:
        if len(entry.shape) != 1:
            raise fault(f"{name}.shape", "of one axis", entry.shape)
    elif entry.shape not in forms:
        raise fault(f"{name}.shape", f"one of {', '.join(map(str, forms))}", entry.shape)
