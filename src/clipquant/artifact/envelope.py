"""Bytes that prove themselves: tensors and one JSON object in a safetensors file, with digests."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import struct
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from clipquant.errors import ArgumentError

FORMAT_VERSION = 1
_KEY = "clipquant"
_BLANK = "0" * 64  # stands for the digest while the digest is taken
_SHORT = 16  # hex digits of a tensor's own digest
# How safetensors calls the dtypes, in the order in which it lays tensors out.
_KINDS = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64",
    torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16",
    torch.float16: "F16", torch.uint16: "U16", torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_PLACE = {dtype: place for place, dtype in enumerate(_KINDS)}


class ArtifactError(ArgumentError):
    """A file that cannot be trusted or used: says which file, what is wrong, and what to do."""


def seal(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return the bytes of a safetensors file whose metadata holds `about` and digests of all of it.

    The same tensors and `about` give the same bytes.

    Args:
        tensors: Key -> contiguous tensor on the CPU.
        about: JSON-able.
    """
    text = _text(about, {name: _digest(tensor) for name, tensor in tensors.items()})
    data = safetensors.torch.save(dict(tensors), {_KEY: text})
    end = _header_end(data)
    digest = hashlib.sha256(data).hexdigest()
    return data[:end].replace(_BLANK.encode(), digest.encode(), 1) + data[end:]


def sealed_size(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> int:
    """Return the length of what `seal` gives, from the shapes and dtypes of the tensors alone.

    Args:
        tensors: Key -> tensor, on any device, `meta` too.
        about: JSON-able.

    >>> sealed_size({"a": torch.ones(3)}, {}) == len(seal({"a": torch.ones(3)}, {}))
    True
    """
    text = _text(about, dict.fromkeys(tensors, _BLANK[:_SHORT]))
    header: dict[str, Any] = {"__metadata__": {_KEY: text}}
    end = 0
    for name in sorted(tensors, key=lambda name: (_PLACE[tensors[name].dtype], name)):
        tensor, start = tensors[name], end
        end += tensor.nbytes
        kind = _KINDS[tensor.dtype]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [start, end]}
    written = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + len(written) + -len(written) % 8 + end  # the header is padded to whole words


def _text(about: Mapping[str, Any], digests: Mapping[str, str]) -> str:
    metadata = {
        "format_version": FORMAT_VERSION, **about, "digests": digests, "sha256": _BLANK,
    }  # fmt: skip
    return json.dumps(metadata, separators=(",", ":"), sort_keys=True)


def unseal(data: bytes, path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the JSON object of a sealed file, proven whole.

    Args:
        data: The file's bytes.
        path: Its name, for errors.

    Raises:
        ArtifactError: If any byte has changed, or the format is newer than this code.
    """
    metadata = _metadata(data, path)
    _check_version(metadata, path)
    damage = _damage(data, metadata)
    if damage:
        raise ArtifactError(f"{path} is damaged: {'; '.join(damage)}. Fetch or write it again.")
    return safetensors.torch.load(data), metadata


def verify_artifact(path: str | Path) -> list[str]:
    """Return what is damaged in a file, in words; an empty list is a whole file.

    Args:
        path: The file.
    """
    try:
        data = read_bytes(path)
        metadata = _metadata(data, path)
        _check_version(metadata, path)
    except ArtifactError as error:
        return [str(error)]
    return _damage(data, metadata)


def read_metadata(path: str | Path) -> dict[str, Any]:
    """Return a file's JSON object without reading its tensors or proving them whole."""
    try:
        with open(path, "rb") as file:
            head = file.read(8)
            head += file.read(min(_header_end(head + bytes(8)) - 8, os.path.getsize(path)))
    except OSError as error:
        raise _unreadable(path, error) from error
    return _metadata(head, path, whole=False)


def read_bytes(path: str | Path) -> bytes:
    """Return a file's bytes, or raise ArtifactError saying why there are none."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name stands for the old bytes or the new, never for a part."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can open folders (not Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(tensor: Tensor) -> str:
    """Return the first 16 hex digits of a tensor's sha256: enough to say which one is damaged."""
    return hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy().data).hexdigest()[:_SHORT]


def _header_end(data: bytes) -> int:
    return 8 + int(struct.unpack("<Q", data[:8])[0])


def _metadata(data: bytes, path: str | Path, whole: bool = True) -> dict[str, Any]:
    """Return the JSON object in a file's header, or say why there is none."""
    if len(data) < 8:
        raise ArtifactError(f"{path} is damaged: it ends after {len(data)} bytes.")
    end = _header_end(data)
    if end > len(data):
        raise ArtifactError(f"{path} is damaged or no safetensors file: its header is cut off.")
    try:
        header = json.loads(data[8:end])
        text = header.get("__metadata__", {}).get(_KEY)
        metadata = json.loads(text) if text is not None else None
        sizes = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ArtifactError(f"{path} is damaged or no safetensors file: {error}.") from error
    if not isinstance(metadata, dict):
        raise ArtifactError(
            f"{path} is a safetensors file without clipquant's metadata: not one of its artifacts, "
            "or damaged."
        )
    if whole and end + max(sizes, default=0) != len(data):
        raise ArtifactError(
            f"{path} is damaged: {len(data)} bytes, where its header says "
            f"{end + max(sizes, default=0)}. Fetch or write it again."
        )
    return metadata


def _check_version(metadata: Mapping[str, Any], path: str | Path) -> None:
    version = metadata.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ArtifactError(f"{path} is damaged: format_version is {version!r}.")
    if version > FORMAT_VERSION:
        raise ArtifactError(
            f"{path} has format_version {version}; this clipquant reads up to {FORMAT_VERSION}. "
            "Upgrade clipquant."
        )


def _damage(data: bytes, metadata: Mapping[str, Any]) -> list[str]:
    """Return which parts of a file do not match their digests."""
    end, digest = _header_end(data), metadata.get("sha256")
    if not isinstance(digest, str) or len(digest) != 64:
        return ["its sha256 is missing from the header"]
    whole = hashlib.sha256(data[:end].replace(digest.encode(), _BLANK.encode(), 1))
    whole.update(memoryview(data)[end:])
    if whole.hexdigest() == digest:
        return []
    return _damaged_tensors(data, metadata) or ["its header"]


def _damaged_tensors(data: bytes, metadata: Mapping[str, Any]) -> list[str]:
    try:
        tensors = safetensors.torch.load(data)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        return [f"its header ({error})"]
    digests = metadata.get("digests")
    if not isinstance(digests, dict):
        return []
    return [name for name, tensor in tensors.items() if digests.get(name) != _digest(tensor)]


def _unreadable(path: str | Path, error: OSError) -> ArtifactError:
    return ArtifactError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.")
