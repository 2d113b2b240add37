"""A model's weights to the tensors and the JSON object of a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clipquant._version import __version__
from clipquant.artifact.envelope import find_damage, open_sealed, read_bytes, seal, sealed_size
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.schema import CODING, PARTS, Manifest
from clipquant.artifact.table import DATA, DIGESTS, TABLE
from clipquant.artifact.weights import Parts, outline, unpacked_weight
from clipquant.errors import MissingPackageError
from clipquant.files import write_whole
from clipquant.quant.codes.entropy import coder_library
from clipquant.quant.codes.pack import pack, packed_bytes
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import QuantizedWeights


@dataclass(frozen=True)
class Artifact:
    """What a file holds: the weights, and what it says of itself.

    Args:
        weights: Codes, scales and everything else of the model's state.
        metadata: Every field of the file's header, checked.
    """

    weights: QuantizedWeights
    metadata: Manifest


def save_artifact(
    weights: QuantizedWeights, path: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the weights to `path`, so that either the whole new file stands there or the old one.

    What is to be written is read back as any file is, and compared, before the disk is touched; the
    bytes on disk are compared before they get their name.

    Args:
        weights: What to save.
        path: Name of the file; its folder is made where it is missing.
        extra: JSON-able entries for the metadata; "details" is left out where it would cost 1 % or more.

    Returns:
        The path written.

    Raises:
        OSError: If the folder cannot be made, is not writable or full; an old file stays.
        ArtifactError: If what was read back differs from what was meant.
    """
    path = Path(path)
    data = serialize(weights, extra)
    _compare(
        weights,
        parse(bytearray(data), path, {n: t.layout.shape for n, t in weights.tensors.items()}),
        path,
    )
    write_whole(path, data)
    return path


def serialize(weights: QuantizedWeights, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes of the file, the same for the same weights and `extra`.

    Args:
        weights: What to save.
        extra: JSON-able entries for the metadata.
    """
    stored = {name: value.cpu().contiguous() for name, value in _stored(weights, pack).items()}
    try:
        return seal(stored, _about(weights, extra))
    except UnicodeEncodeError as error:
        raise ArtifactError(
            f"a tensor's name or a note cannot be written as UTF-8 ({error}): rename it."
        ) from error


def serialized_size(weights: QuantizedWeights, extra: Mapping[str, Any] | None = None) -> int:
    """Return the length of what `serialize` gives, without packing or hashing anything.

    Args:
        weights: What would be saved.
        extra: JSON-able entries for the metadata.

    >>> from clipquant.quant.quantize import quantize_weights
    >>> from clipquant.quant.recipe import Recipe
    >>> weights = quantize_weights(torch.nn.Linear(8, 4), Recipe(bits=3))
    >>> serialized_size(weights) == len(serialize(weights))
    True
    """
    return sealed_size(_stored(weights, _as_if_packed), _about(weights, extra))


def _as_if_packed(codes: Tensor, bits: int | Tensor) -> Tensor:
    size = packed_bytes(bits, tuple(codes.shape))
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _about(weights: QuantizedWeights, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    own = {
        "tensors": {name: _describe(tensor) for name, tensor in weights.tensors.items()},
        "aliases": dict(weights.aliases),
        "left": [[item.name, item.bytes, item.why] for item in weights.left],
        "versions": {"clipquant": __version__, "torch": torch.__version__},
        **({"lookups": sorted(weights.lookups)} if weights.lookups else {}),
    }
    return own | dict(extra or {})


def read_artifact(path: str | Path, *, max_constant_bytes: int | None = None) -> Artifact:
    """Return what a file holds, after proving that no byte of it has changed and no field is nonsense.

    Args:
        path: A file written by `save_artifact`.
        max_constant_bytes: See `load_quantized`.

    Raises:
        ArtifactError: If the file is missing, not an artifact, damaged, made to do harm, or of a newer
            format.
    """
    return parse(read_bytes(path), path, {}, max_constant_bytes)


def read_outline(path: str | Path) -> Artifact:
    """Return what a file holds, its codes left out: they stand on the meta device and take no memory.

    Args:
        path: A file written by `save_artifact`.

    Raises:
        ArtifactError: As `read_artifact`; rows of 0 bits may have any length.
    """
    parts = Parts(open_sealed(read_bytes(path), path), path)
    manifest = parts.opened.manifest
    tensors = {name: outline(parts, name) for name in manifest.weights}
    return Artifact(weights_of(parts, tensors), manifest)


def verify_artifact(path: str | Path) -> list[str]:
    """Return what is damaged in a file, in words; an empty list is a whole file that can be used.

    Args:
        path: The file.
    """
    try:
        damage = find_damage(path)
        if not damage and any(
            t.stream is not None for t in read_outline(path).weights.tensors.values()
        ):
            coder_library()
        return damage
    except (ArtifactError, MissingPackageError) as error:
        return [str(error)]


def parse(
    data: bytearray,
    path: str | Path,
    known: Mapping[str, tuple[int, ...]],
    max_constant_bytes: int | None = None,
) -> Artifact:
    """Return what bytes hold; weights of shapes that are known need not be paid for by the file."""
    parts = Parts(open_sealed(data, path), path)
    manifest = parts.opened.manifest
    parts.check_constants(known, max_constant_bytes)
    tensors = {name: unpacked_weight(parts, name) for name in manifest.weights}
    return Artifact(weights_of(parts, tensors), manifest)


def weights_of(parts: Parts, tensors: Mapping[str, QuantizedTensor]) -> QuantizedWeights:
    """Return the whole state of a file, given its quantized weights."""
    manifest = parts.opened.manifest
    floats = {name: parts.opened.tensor(name) for name in manifest.floats}
    lookups = manifest.lookups
    return QuantizedWeights(tensors, floats, manifest.aliases, manifest.left, lookups=lookups)


def _stored(
    weights: QuantizedWeights, pack: Callable[[Tensor, int | Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of the file: NAME.q, NAME.scale, NAME.zero, NAME.bits, and the rest."""
    stored = dict(weights.floats)
    for name, tensor in weights.tensors.items():
        bits = tensor.bits if isinstance(tensor.bits, Tensor) else None
        codes = pack(tensor.codes, tensor.bits) if tensor.stream is None else tensor.stream
        held = (codes, tensor.scale, tensor.zero, bits)
        for part, value in zip(PARTS, held, strict=True):
            key = f"{name}.{part}"
            if key in stored:
                raise ArtifactError(
                    f"the model has a tensor {key!r}, which is a name of the file's own."
                )
            if value is not None:
                stored[key] = value
    for key in (DATA, DIGESTS, TABLE):
        if key in stored:
            raise ArtifactError(
                f"the model has a tensor {key!r}, which is a name of the file's own."
            )
    return stored


def _describe(tensor: QuantizedTensor) -> dict[str, Any]:
    """Return what of a weight its parts do not tell, without what is so for nearly every weight."""
    bits, layout = tensor.bits, tensor.layout
    said: dict[str, Any] = {
        "bits": "rows" if isinstance(bits, Tensor) else bits,
        "shape": list(layout.shape),
        "method": tensor.method,
    }
    if not isinstance(bits, Tensor) and tensor.levels != 2**bits - 1:
        said["levels"] = tensor.levels
    if tensor.group_size < layout.columns:
        said["granularity"] = tensor.group_size
    if layout.axis or layout.groups > 1:
        said |= {"axis": layout.axis, "groups": layout.groups}
    if tensor.dtype != torch.float32:
        said["dtype"] = str(tensor.dtype).removeprefix("torch.")
    if tensor.stream is not None:
        said["coding"] = CODING
    return said


def _compare(written: QuantizedWeights, read: Artifact, path: Path) -> None:
    """Raise unless each weight that was read stands for exactly the value that was meant."""
    for name, tensor in written.tensors.items():
        if not torch.equal(dequantize(tensor).cpu(), dequantize(read.weights.tensors[name])):
            raise ArtifactError(f"{path}: read back, {name} differs from what was written.")
