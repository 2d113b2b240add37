"""The tensors of a file: their dtypes and shapes, and that they fill it without gap or overlap."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from clipquant.fields import FieldError, entries, fault, items, one_of, shape, text, whole

# How safetensors calls the dtypes, in the order in which it lays tensors out.
KINDS = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in KINDS.items()}
FLOATS = {str(d).removeprefix("torch."): d for d in KINDS if d.is_floating_point and d.itemsize > 1}
_EMPTY = 1 << 20  # most that an axis of a tensor without elements may have: nothing pays for it


@dataclass(frozen=True)
class Entry:
    """One tensor of the file, and where its bytes stand behind the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read_entries(header: Mapping[str, Any], size: int) -> dict[str, Entry]:
    """Return the tensors of a safetensors header, which fill `size` bytes without gap or overlap.

    Args:
        header: The header, without its metadata.
        size: Bytes behind the header.

    Raises:
        FieldError: Naming the field that cannot be.
    """
    found = {}
    for name, value in header.items():
        about = entries(value, name)
        text(name, "a tensor's name")
        place = items(about.get("data_offsets"), f"{name}.data_offsets", 2)
        start, stop = (whole(offset, f"{name}.data_offsets") for offset in place)
        kind, sides = about.get("dtype"), about.get("shape")
        found[name] = _entry(name, kind, sides, start)
        if stop != found[name].stop:
            raise fault(f"{name}.data_offsets", "as long as its shape and dtype say", place)
    ordered = sorted(found.items(), key=lambda item: (item[1].start, item[1].stop))
    end = 0
    for name, entry in ordered:
        if entry.start != end:
            raise fault(f"{name}.data_offsets", f"a run from byte {end}", [entry.start, entry.stop])
        end = entry.stop
    if end != size:
        raise FieldError(f"the tensors must fill {size} bytes; they take {end}.")
    return dict(ordered)


def listed_entries(listed: Any, size: int) -> dict[str, Entry]:
    """Return the tensors of a list of [name, dtype, shape] that follow one another and fill `size` bytes."""
    found: dict[str, Entry] = {}
    end = 0
    for value in items(listed, "entries"):
        given, kind, sides = items(value, "entries", 3)
        name = text(given, "a tensor's name")
        if name in found:
            raise FieldError(f"entries must name each tensor once; {name} stands there twice.")
        found[name] = _entry(name, kind, sides, end)
        end = found[name].stop
    if end != size:
        raise FieldError(f"the tensors must fill {size} bytes; they take {end}.")
    return found


def _entry(name: str, kind: Any, sides: Any, start: int) -> Entry:
    dtype = one_of(kind, f"{name}.dtype", _DTYPES)
    form = paid(shape(sides, f"{name}.shape"), f"{name}.shape")
    return Entry(dtype, form, start, start + math.prod(form) * dtype.itemsize)


def paid(form: tuple[int, ...], at: str) -> tuple[int, ...]:
    """Return a shape; one without elements may not be large, since no byte of a file pays for it."""
    if 0 in form and max(form) > _EMPTY:
        raise fault(at, f"of axes up to {_EMPTY} where there are no elements", form)
    return form
