"""A model's weights to the tensors and the JSON object of a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipquant._version import __version__
from clipquant.artifact.envelope import find_damage, open_sealed, read_bytes, seal, sealed_size
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.schema import PARTS, Manifest
from clipquant.artifact.table import DATA, DIGESTS, TABLE
from clipquant.artifact.weights import Parts, outline, packed_weight, unpacked_weight
from clipquant.errors import ArgumentError
from clipquant.files import write_whole
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
        _parse(bytearray(data), path, {n: t.layout.shape for n, t in weights.tensors.items()}),
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
    >>> weights = quantize_weights(nn.Linear(8, 4), Recipe(bits=3))
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
    return _parse(read_bytes(path), path, {}, max_constant_bytes)


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
    return Artifact(_weights(parts, tensors), manifest)


def verify_artifact(path: str | Path) -> list[str]:
    """Return what is damaged in a file, in words; an empty list is a whole file that can be used.

    Args:
        path: The file.
    """
    try:
        damage = find_damage(path)
        if not damage:
            read_outline(path)
        return damage
    except ArtifactError as error:
        return [str(error)]


def _parse(
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
    return Artifact(_weights(parts, tensors), manifest)


def _weights(parts: Parts, tensors: Mapping[str, QuantizedTensor]) -> QuantizedWeights:
    manifest = parts.opened.manifest
    floats = {name: parts.opened.tensor(name) for name in manifest.floats}
    lookups = manifest.lookups
    return QuantizedWeights(tensors, floats, manifest.aliases, manifest.left, lookups=lookups)


def load_quantized(
    path: str | Path,
    model: nn.Module | None = None,
    *,
    packed: bool = False,
    max_constant_bytes: int | None = None,
) -> dict[str, Tensor] | nn.Module:
    """Return the state dict that a file holds, dequantized, or `model` with it loaded.

    Nothing that is read can do harm: a file that was damaged or made to do so raises `ArtifactError`, and
    memory is taken in proportion to the file. Rows of 0 bits, which cost a file nothing, are no larger
    than those of `model`; without one they may come to 32 MB and twice the file.

    Args:
        path: A file written by `QuantizedModel.save` or `QuantizeOnFitEnd`.
        model: A module of the architecture that was saved. Left untouched unless all fits.
        packed: Whether `model` is to hold its weights packed, as the file does, and dequantize a
            layer at a time when it runs: about the file's size in memory, the same outputs, and
            weights that cannot be trained. It may have been built under `torch.device("meta")`.
        max_constant_bytes: Without a model, most bytes that rows of 0 bits may come to. None: 32 MB and
            twice the file.

    Returns:
        Without `model`: every key of the saved model's state dict -> tensor, for
        `load_state_dict`. With it: `model` itself.

    Raises:
        ArtifactError: If the file is missing, damaged or of a newer format, or `model` differs
            from what was saved (names the missing, the unexpected and the misshapen tensors).
        ValueError: If `packed` is asked for without a model.

    >>> load_quantized("none.safetensors")
    Traceback (most recent call last):
    ...
    clipquant.artifact.fault.ArtifactError: none.safetensors cannot be read: no such file or \
directory.
    """
    if model is None:
        if packed:
            raise ArgumentError(
                "packed=True needs a model to hold the packed weights; got model=None. "
                "Pass a module, or leave packed out for a state dict."
            )
        return _parse(read_bytes(path), path, {}, max_constant_bytes).weights.state_dict()
    parts = Parts(open_sealed(read_bytes(path), path), path)
    manifest = parts.opened.manifest
    _check_fit(model, manifest.shapes, str(path))
    if packed:
        return _load_packed(parts, model)
    tensors = {name: unpacked_weight(parts, name) for name in manifest.weights}
    return load_state(model, _weights(parts, tensors).state_dict(), str(path))


def _load_packed(parts: Parts, model: nn.Module) -> nn.Module:
    """Load a file that fits into `model` without unpacking it."""
    # Layers, which reading alone has no use for.
    from clipquant.quant.packed.modules import pack_modules_

    manifest = parts.opened.manifest
    tensors = {name: packed_weight(parts, name) for name in manifest.weights}
    floats = {name: parts.opened.tensor(name) for name in manifest.floats}
    floats |= {alias: floats[name] for alias, name in manifest.aliases.items() if name in floats}
    assign = _on_meta(model)
    _check_filled(model, manifest.shapes, parts.path)
    pack_modules_(model, tensors, manifest.aliases)
    model.load_state_dict(floats, strict=False, assign=assign)
    return model


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load a state dict into `model` if every key and shape fits; otherwise change nothing."""
    _check_fit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    _check_filled(model, state, source)
    model.load_state_dict(dict(state), strict=False, assign=_on_meta(model))
    return model


def _on_meta(model: nn.Module) -> bool:
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def _check_filled(model: nn.Module, held: Iterable[str], source: object) -> None:
    """Raise for tensors without values ("meta") that a state with these keys would leave so."""
    named = (*model.named_parameters(), *model.named_buffers())
    left = sorted({name for name, tensor in named if tensor.is_meta} - set(held))
    if left:
        raise ArtifactError(
            f"{source} has no values for {', '.join(left)}, which the model holds on the device 'meta' and does "
            "not save. Build the model on a real device, or give these tensors their values first."
        )


def _check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], source: str) -> None:
    """Raise unless the model has exactly these tensors, in these shapes."""
    own = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    misshapen = [
        f"{k} is {shapes[k]} in the file, {tuple(own[k].shape)} in the model"
        for k in own.keys() & shapes.keys()
        if tuple(own[k].shape) != shapes[k]
    ]
    faults = {
        "missing from the file": sorted(own.keys() - shapes.keys()),
        "not in the model": sorted(shapes.keys() - own.keys()),
        "of another shape": sorted(misshapen),
    }
    if any(faults.values()):
        said = "; ".join(f"{what}: {', '.join(names)}" for what, names in faults.items() if names)
        raise ArtifactError(
            f"{source} does not fit {type(model).__name__}: {said}. "
            "Build the model with the arguments it was trained with."
        )


def _stored(
    weights: QuantizedWeights, pack: Callable[[Tensor, int | Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the tensors of the file: NAME.q, NAME.scale, NAME.zero, NAME.bits, and the rest."""
    stored = dict(weights.floats)
    for name, tensor in weights.tensors.items():
        bits = tensor.bits if isinstance(tensor.bits, Tensor) else None
        held = (pack(tensor.codes, tensor.bits), tensor.scale, tensor.zero, bits)
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
    return said


def _compare(written: QuantizedWeights, read: Artifact, path: Path) -> None:
    """Raise unless each weight that was read stands for exactly the value that was meant."""
    for name, tensor in written.tensors.items():
        if not torch.equal(dequantize(tensor).cpu(), dequantize(read.weights.tensors[name])):
            raise ArtifactError(f"{path}: read back, {name} differs from what was written.")
