"""The header of a file: plain safetensors, or where that would cost much, one compressed table."""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clipquant.fields import FieldError

DATA, DIGESTS, TABLE = "clipquant.data", "clipquant.digests", "clipquant.table"
_BASE, _EACH = 1500, 40  # bytes that a plain header may take, for the file and for each tensor
_SHARE = 100  # or this part of the tensors' bytes
_RATIO = 64  # to which a table may inflate, beyond what any file may
_FREE = 1 << 20

Listed = Sequence[
    tuple[str, str, list[int], int]
]  # name, dtype, shape and bytes, in the order of the file


@dataclass(frozen=True)
class Frame:
    """What stands before and behind the tensors' bytes, and where in it the file's digest goes."""

    head: bytes
    tail: bytes
    blank: int


def framed(key: str, listed: Listed, about: Mapping[str, Any], digests: bytes, blank: str) -> Frame:
    """Return the header of a file, without "details" where they would cost 1 % of the file or more.

    A plain header names every tensor as any reader of safetensors expects it. Where it would take more
    than 1,500 bytes and 40 a tensor, and more than 1 % of the tensors, it is compressed: then the file
    has three tensors, all bytes to a foreign reader, the last of which is the table.

    Args:
        key: Of the metadata.
        listed: The tensors.
        about: JSON-able.
        digests: Of the tensors, one after another.
        blank: What stands where the file's own digest goes.
    """
    bare = {name: value for name, value in about.items() if name != "details"}
    payload = sum(size for *_, size in listed)
    frame = plain = _plain(key, listed, bare, digests, blank)
    make = _plain
    if len(plain.head) > max(_BASE + _EACH * _tensors(listed, about), payload // _SHARE):
        packed = _compressed(key, listed, bare, digests, blank)
        if len(packed.head) + len(packed.tail) < len(plain.head):
            frame, make = packed, _compressed
    if "details" not in about:
        return frame
    full = make(key, listed, about, digests, blank)
    cost = len(full.head) + len(full.tail) - len(frame.head) - len(frame.tail)
    return full if cost * _SHARE < payload + len(frame.head) + len(frame.tail) else frame


def inflate(data: bytes, most: int) -> bytes:
    """Return a table's JSON, of at most so many bytes and 64 times its own.

    Raises:
        FieldError: If it is larger, damaged, or followed by something else.
    """
    room = min(most, _FREE + _RATIO * len(data))
    worker = zlib.decompressobj()
    try:
        found = worker.decompress(data, room)
    except zlib.error as error:
        raise FieldError(f"{TABLE} must be deflated JSON: {error}.") from error
    if not worker.eof or worker.unused_data:
        raise FieldError(f"{TABLE} must be deflated JSON of at most {room:,} bytes, and end there.")
    return found


def _tensors(listed: Listed, about: Mapping[str, Any]) -> int:
    """Return how many tensors the model has, a quantized one counted once."""
    weights = about.get("tensors", {})
    parts = (name.rpartition(".") for name, *_ in listed)
    return sum(not (base in weights and part != "q") for base, _, part in parts)


def _plain(key: str, listed: Listed, about: Mapping[str, Any], digests: bytes, blank: str) -> Frame:
    said = {**about, "digests": base64.b64encode(digests).decode()}
    header: dict[str, Any] = {}
    end = 0
    for name, kind, form, size in listed:
        header[name] = {"dtype": kind, "shape": form, "data_offsets": [end, end + size]}
        end += size
    return _headed(key, said, header, blank, b"")


def _compressed(
    key: str, listed: Listed, about: Mapping[str, Any], digests: bytes, blank: str
) -> Frame:
    stub = {"format_version": about["format_version"]}
    rest = {name: value for name, value in about.items() if name not in stub}
    rest["entries"] = [[name, kind, form] for name, kind, form, _ in listed]
    table = zlib.compress(_text(rest).encode(), 9)
    header: dict[str, Any] = {}
    end = 0
    sizes = (sum(size for *_, size in listed), len(digests), len(table))
    for name, size in zip((DATA, DIGESTS, TABLE), sizes, strict=True):
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    return _headed(key, stub, header, blank, digests + table)


def _headed(
    key: str, about: Mapping[str, Any], header: Mapping[str, Any], blank: str, tail: bytes
) -> Frame:
    said = f'{_text(about)[:-1]},"sha256":"{blank}"}}'
    start = _text({"__metadata__": {key: said}})[:-1]
    rest = _text(header)[1:] if header else "}"
    written = f"{start}{',' if header else ''}{rest}".encode()
    written += b" " * (-len(written) % 8)  # whole words, so that tensors are aligned
    ends = '\\"}"}'  # what follows the blank: the ends of the value, its object, the text and the metadata
    place = 8 + len(start.encode()) - len(ends) - len(blank)
    return Frame(struct.pack("<Q", len(written)) + written, tail, place)


def _text(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
