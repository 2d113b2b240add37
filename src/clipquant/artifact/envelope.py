"""Bytes that prove themselves: tensors and one JSON object in a safetensors file, with digests."""

from __future__ import annotations

import base64
import hashlib
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipquant.artifact.entries import KINDS, Entry, listed_entries, read_entries
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.schema import Manifest, oldest_version, read_manifest
from clipquant.artifact.table import DATA, DIGESTS, TABLE, Frame, framed, inflate
from clipquant.fields import FieldError, entries, fault, read_json, text

FORMAT_VERSION = 3  # the newest that is read
ROOM = (
    32 << 20
)  # bytes that what is read may take in memory before the file's own bytes have paid for it
_KEY = "clipquant"
_BLANK = "0" * 64  # stands for the digest while the digest is taken
_ZIP = b"PK\x03\x04"  # how files of torch.save begin
_SHORT = 3  # bytes of a tensor's own digest: enough to say which one is damaged
_KINDS = KINDS
_PLACE = {dtype: place for place, dtype in enumerate(KINDS)}


@dataclass(frozen=True)
class Opened:
    """A file's bytes, proven whole, and what they say of themselves."""

    data: bytearray
    manifest: Manifest
    first: int  # byte of the file at which entries begin

    def tensor(self, name: str) -> Tensor:
        """Return a copy of one tensor."""
        entry = self.manifest.entries[name]
        if 0 in entry.shape:
            return torch.empty(entry.shape, dtype=entry.dtype)
        raw = torch.frombuffer(
            self.data, dtype=torch.uint8, count=entry.stop - entry.start, offset=self.first + entry.start
        )  # fmt: skip
        return raw.clone().view(entry.dtype).reshape(entry.shape)


def seal(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file whose metadata holds `about` and digests of all of it.

    The same tensors and `about` give the same bytes.

    Args:
        tensors: Key -> contiguous tensor on the CPU.
        about: JSON-able. Its entry "details" is left out where it would cost 1 % of the file or more.
    """
    ordered = [(name, tensors[name]) for name in _ordered(tensors)]
    bodies = [_bytes_of(tensor) for _, tensor in ordered]
    digests = b"".join(hashlib.sha256(body).digest()[:_SHORT] for body in bodies)
    frame = _frame(tensors, about, digests)
    whole = hashlib.sha256(frame.head)
    for body in bodies:
        whole.update(body)
    whole.update(frame.tail)
    at = frame.blank
    head = frame.head[:at] + whole.hexdigest().encode() + frame.head[at + len(_BLANK) :]
    return b"".join((head, *bodies, frame.tail))


def sealed_size(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Return the length of what `seal` gives, from the shapes and dtypes of the tensors alone.

    Args:
        tensors: Key -> tensor, on any device, `meta` too.
        about: JSON-able.

    >>> sealed_size({"a": torch.ones(3)}, {}) == len(seal({"a": torch.ones(3)}, {}))
    True
    """
    frame = _frame(tensors, about, bytes(_SHORT * len(tensors)))
    return len(frame.head) + len(frame.tail) + sum(tensor.nbytes for tensor in tensors.values())


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    return sorted(tensors, key=lambda name: (_PLACE[tensors[name].dtype], name))


def _frame(tensors: Mapping[str, Tensor], about: Mapping[str, Any], digests: bytes) -> Frame:
    listed = [
        (name, KINDS[tensors[name].dtype], list(tensors[name].shape), tensors[name].nbytes)
        for name in _ordered(tensors)
    ]
    return framed(_KEY, listed, {**about, "format_version": oldest_version(about)}, digests, _BLANK)


def open_sealed(data: bytearray, path: str | Path) -> Opened:
    """Return a sealed file's tensors and records, proven whole and free of nonsense.

    Args:
        data: The file's bytes.
        path: Its name, for errors.

    Raises:
        ArtifactError: If any byte has changed, the format is newer than this code, or a field holds
            what cannot be.
    """
    head = _read_head(data, path, len(data))
    try:
        damage = _damage(data, head)
    except FieldError as error:
        raise _cannot_be(path, error) from error
    if damage:
        raise ArtifactError(f"{path} is damaged: {'; '.join(damage)}. Fetch or write it again.")
    try:
        about = _about(head, lambda start, stop: bytes(memoryview(data)[start:stop]))
        held, first = _held(head, about)
        return Opened(data, read_manifest(about, held), first)
    except FieldError as error:
        raise _cannot_be(path, error) from error


def find_damage(path: str | Path) -> list[str]:
    """Return which tensors of a file differ from their digests, in words; an empty list is a whole file.

    Raises:
        ArtifactError: If the file cannot be read at all.
    """
    data = read_bytes(path)
    head = _read_head(data, path, len(data))
    try:
        return _damage(data, head)
    except FieldError as error:
        raise _cannot_be(path, error) from error


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return a file's JSON object without reading its tensors or proving them whole."""
    try:
        with open(path, "rb") as file:
            size = os.path.getsize(path)
            data = file.read(8)
            if len(data) == 8:
                data += file.read(min(_header_end(data) - 8, size))

            def read(start: int, stop: int) -> bytes:
                file.seek(start)
                return file.read(stop - start)

            return _about(_read_head(data, path, size), read)
    except OSError as error:
        raise _unreadable(path, error) from error
    except FieldError as error:
        raise _cannot_be(path, error) from error


def read_bytes(path: str | Path) -> bytearray:
    """Return a file's bytes, or raise ArtifactError saying why there are none."""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            data = bytearray(size)
            del data[file.readinto(data) :]
            return data
    except OSError as error:
        raise _unreadable(path, error) from error


@dataclass(frozen=True)
class _Head:
    """A header: its metadata, its other entries, and where it and the file end."""

    about: Mapping[str, Any]
    entries: Mapping[str, Any]
    end: int
    size: int


def _read_head(data: bytes | bytearray, path: str | Path, size: int) -> _Head:
    """Return a file's header, or say why there is none."""
    if len(data) < 8:
        raise ArtifactError(f"{path} is damaged: it ends after {len(data)} bytes.")
    if data[:4] == _ZIP:
        raise ArtifactError(
            f"{path} is no safetensors file but a zip archive, as checkpoints of torch and Lightning are. To "
            "quantize one: clipquant quantize --config FILE --ckpt_path CHECKPOINT, or "
            "quantize(Net.load_from_checkpoint(path)).save(file)."
        )
    end = _header_end(data)
    if end > len(data):
        raise ArtifactError(f"{path} is damaged or no safetensors file: its header is cut off.")
    try:
        header = entries(read_json(bytes(data[8:end]), "its header", ROOM + size), "its header")
        metadata = entries(header.pop("__metadata__", {}), "__metadata__")
        said = metadata.get(_KEY)
        if said is None:
            raise ArtifactError(
                f"{path} is a safetensors file without clipquant's metadata: not one of its artifacts, "
                "or damaged."
            )
        raw = text(said, f"__metadata__.{_KEY}", size).encode()
        about = entries(read_json(raw, "its metadata", ROOM + size), "its metadata")
    except FieldError as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}") from error
    _check_version(about, path)
    return _Head(about, header, end, size)


def _check_version(about: Mapping[str, Any], path: str | Path) -> None:
    version = about.get("format_version")
    if type(version) is not int or version < 1:
        raise ArtifactError(f"{path} is damaged: format_version is {version!r:.40}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {version}; this clipquant reads up to {FORMAT_VERSION}. "
            "Upgrade clipquant."
        )


def _about(head: _Head, read: Callable[[int, int], bytes]) -> dict[str, Any]:
    """Return the whole JSON object: where the header holds only a stub, the table's too."""
    if TABLE not in head.entries or head.about["format_version"] < 2:
        return dict(head.about)
    place = read_entries(head.entries, head.size - head.end)[TABLE]
    raw = inflate(read(head.end + place.start, head.end + place.stop), ROOM + head.size)
    table = entries(read_json(raw, "its table", ROOM + head.size), "its table")
    return {**table, **head.about}


def _held(head: _Head, about: Mapping[str, Any]) -> tuple[dict[str, Entry], int]:
    """Return the tensors of a file, and the byte at which they begin."""
    held = read_entries(head.entries, head.size - head.end)
    if TABLE not in held or head.about["format_version"] < 2:
        return held, head.end
    data = held.get(DATA)
    if data is None or data.start or set(held) != {DATA, DIGESTS, TABLE}:
        raise FieldError(
            f"a file with a {TABLE} must hold {DATA} first, {DIGESTS} and nothing else."
        )
    return listed_entries(about.get("entries"), data.stop), head.end


def _damage(data: bytearray, head: _Head) -> list[str]:
    """Return which parts of a file do not match their digests."""
    digest = head.about.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64 or not digest.isascii():
        return ["its sha256 is missing from the header"]
    whole = hashlib.sha256(data[: head.end].replace(digest.encode(), _BLANK.encode(), 1))
    whole.update(memoryview(data)[head.end :])
    if whole.hexdigest() == digest:
        return []
    return _damaged_tensors(data, head) or ["its header"]


def _damaged_tensors(data: bytearray, head: _Head) -> list[str]:
    try:
        about = _about(head, lambda start, stop: bytes(memoryview(data)[start:stop]))
        held, first = _held(head, about)
        digests = _digests(about, held, data, head)
    except FieldError as error:
        return [f"its header ({error})"]
    parts = memoryview(data)
    return [
        name
        for name, entry in held.items()
        if not _matches(parts[first + entry.start : first + entry.stop], digests.get(name))
    ]


def _digests(
    about: Mapping[str, Any], held: Mapping[str, Entry], data: bytearray, head: _Head
) -> dict[str, bytes]:
    """Return each tensor's own digest, as far as the file has one."""
    said = about.get("digests")
    if head.about["format_version"] < 2:
        named = entries(said if isinstance(said, dict) else {}, "digests")
        return {k: bytes.fromhex(v) for k, v in named.items() if _is_hex(v)}
    if TABLE in head.entries:
        place = read_entries(head.entries, head.size - head.end)[DIGESTS]
        raw = bytes(memoryview(data)[head.end + place.start : head.end + place.stop])
    else:
        try:
            raw = base64.b64decode(text(said, "digests", len(data)), validate=True)
        except ValueError as error:
            raise fault("digests", "base64", said) from error
    return {name: raw[_SHORT * i : _SHORT * (i + 1)] for i, name in enumerate(held)}


def _is_hex(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 16 and set(value) <= set("0123456789abcdef")


def _matches(part: memoryview, digest: bytes | None) -> bool:
    return bool(digest) and hashlib.sha256(part).digest()[: len(digest or b"")] == digest


def _bytes_of(tensor: Tensor) -> memoryview:
    data: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return data


def _header_end(data: bytes | bytearray) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def _cannot_be(path: str | Path, error: FieldError) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged or made to do harm: {error} Fetch it again from where it was written."
    )


def _unreadable(path: str | Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.")
