"""A model's weights to the tensors and the JSON object of a file, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clipquant._version import __version__
from clipquant.artifact.envelope import (
    ArtifactError,
    read_bytes,
    seal,
    sealed_size,
    unseal,
    write_whole,
)
from clipquant.errors import ArgumentError
from clipquant.quant.codes.grid import Grid, row_levels
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.pack import PackedTensor, pack, packed_bytes, unpack_tensor
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import LeftInFloat, QuantizedWeights


@dataclass(frozen=True)
class Artifact:
    """What a file holds: the weights, and the JSON object that describes them.

    Args:
        weights: Codes, scales and everything else of the model's state.
        metadata: `format_version`, `tensors`, `aliases`, `left`, `versions`, `digests`, `sha256`
            and whatever was given as `extra` when it was saved.
    """

    weights: QuantizedWeights
    metadata: Mapping[str, Any]


def save_artifact(
    weights: QuantizedWeights, path: str | Path, extra: Mapping[str, Any] | None = None
) -> Path:
    """Write the weights to `path`, so that either the whole new file stands there or the old one.

    The file is written beside its place, synced, renamed, its folder synced, then read back and
    compared before this returns.

    Args:
        weights: What to save.
        path: Name of the file; its folder is made where it is missing.
        extra: JSON-able entries for the metadata.

    Returns:
        The path written.

    Raises:
        OSError: If the folder cannot be made, is not writable or full; an old file stays.
        ArtifactError: If what was read back differs from what was written.
    """
    path = Path(path)
    data = serialize(weights, extra)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, data)
    if path.read_bytes() != data:
        raise ArtifactError(
            f"{path}: read back, the file differs from what was written; try again."
        )
    _compare(weights, _parse(data, path).weights, path)
    return path


def serialize(weights: QuantizedWeights, extra: Mapping[str, Any] | None = None) -> bytes:
    """Return the bytes of the file, the same for the same weights and `extra`.

    Args:
        weights: What to save.
        extra: JSON-able entries for the metadata.
    """
    stored = {name: value.cpu().contiguous() for name, value in _stored(weights, pack).items()}
    return seal(stored, _about(weights) | dict(extra or {}))


def serialized_size(weights: QuantizedWeights, extra: Mapping[str, Any] | None = None) -> int:
    """Return the length of what `serialize` gives, without packing or hashing anything.

    Args:
        weights: What would be saved.
        extra: JSON-able entries for the metadata.

    >>> from clipquant.quant.quantize import quantize_weights
    >>> weights = quantize_weights(nn.Linear(8, 4), bits=3)
    >>> serialized_size(weights) == len(serialize(weights))
    True
    """
    return sealed_size(_stored(weights, _as_if_packed), _about(weights) | dict(extra or {}))


def _as_if_packed(codes: Tensor, bits: int | Tensor) -> Tensor:
    size = packed_bytes(bits, tuple(codes.shape))
    return torch.empty(size, dtype=torch.uint8, device="meta")


def _about(weights: QuantizedWeights) -> dict[str, Any]:
    return {
        "tensors": {name: _describe(tensor) for name, tensor in weights.tensors.items()},
        "aliases": dict(weights.aliases),
        "left": [[item.name, item.bytes, item.why] for item in weights.left],
        "versions": _versions(),
        **({"lookups": sorted(weights.lookups)} if weights.lookups else {}),
    }


def read_artifact(path: str | Path) -> Artifact:
    """Return what a file holds, after proving that no byte of it has changed.

    Args:
        path: A file written by `save_artifact`.

    Raises:
        ArtifactError: If the file is missing, not an artifact, damaged, or of a newer format.
    """
    return _parse(read_bytes(path), path)


def _parse(data: bytes, path: str | Path) -> Artifact:
    stored, metadata = unseal(data, path)
    return Artifact(_weights(stored, metadata), metadata)


def load_quantized(
    path: str | Path, model: nn.Module | None = None, *, packed: bool = False
) -> dict[str, Tensor] | nn.Module:
    """Return the state dict that a file holds, dequantized, or `model` with it loaded.

    Args:
        path: A file written by `QuantizedModel.save` or `QuantizeOnFitEnd`.
        model: A module of the architecture that was saved. Left untouched unless all fits.
        packed: Whether `model` is to hold its weights packed, as the file does, and dequantize a
            layer at a time when it runs: about the file's size in memory, the same outputs, and
            weights that cannot be trained. It may have been built under `torch.device("meta")`.

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
    clipquant.artifact.envelope.ArtifactError: none.safetensors cannot be read: no such file or \
directory.
    """
    if packed:
        if model is None:
            raise ArgumentError(
                "packed=True needs a model to hold the packed weights; got model=None. "
                "Pass a module, or leave packed out for a state dict."
            )
        return _load_packed(path, model)
    state = read_artifact(path).weights.state_dict()
    if model is None:
        return state
    return load_state(model, state, str(path))


def _load_packed(path: str | Path, model: nn.Module) -> nn.Module:
    """Load a file into `model` without unpacking it; change nothing unless all fits."""
    from clipquant.quant.packed.modules import (
        pack_modules_,
    )  # layers, which reading alone has no use for

    stored, metadata = unseal(read_bytes(path), path)
    aliases: Mapping[str, str] = metadata["aliases"]
    tensors = {name: _packed(name, about, stored) for name, about in metadata["tensors"].items()}
    shapes = {name: tensor.layout.shape for name, tensor in tensors.items()}
    shapes |= {name: tuple(tensor.shape) for name, tensor in stored.items()}
    _check_fit(model, shapes | {alias: shapes[name] for alias, name in aliases.items()}, str(path))
    floats = stored | {alias: stored[name] for alias, name in aliases.items() if name in stored}
    held = (*model.parameters(), *model.buffers())
    pack_modules_(model, tensors, aliases)
    model.load_state_dict(floats, strict=False, assign=any(tensor.is_meta for tensor in held))
    return model


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> nn.Module:
    """Load a state dict into `model` if every key and shape fits; otherwise change nothing."""
    _check_fit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    model.load_state_dict(dict(state), strict=False)
    return model


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
        parts = {"q": pack(tensor.codes, tensor.bits), "scale": tensor.scale, "zero": tensor.zero}
        parts["bits"] = tensor.bits if isinstance(tensor.bits, Tensor) else None
        for part, value in parts.items():
            key = f"{name}.{part}"
            if key in stored:
                raise ArtifactError(
                    f"the model has a tensor {key!r}, which is a name of the file's own."
                )
            if value is not None:
                stored[key] = value
    return stored


def _describe(tensor: QuantizedTensor) -> dict[str, Any]:
    return {
        "bits": "rows" if isinstance(tensor.bits, Tensor) else tensor.bits,
        "levels": tensor.levels,
        "symmetric": tensor.symmetric,
        "granularity": _granularity(tensor),
        "axis": tensor.layout.axis,
        "groups": tensor.layout.groups,
        "shape": list(tensor.layout.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "method": tensor.method,
    }


def _granularity(tensor: QuantizedTensor) -> str | int:
    if tensor.group_size < tensor.layout.columns:
        return tensor.group_size
    return "tensor" if tensor.scale.shape[0] == 1 < tensor.layout.rows else "channel"


def _weights(stored: dict[str, Tensor], metadata: Mapping[str, Any]) -> QuantizedWeights:
    tensors = {
        name: unpack_tensor(_packed(name, about, stored))
        for name, about in metadata["tensors"].items()
    }
    left = tuple(LeftInFloat(*item) for item in metadata["left"])
    lookups = frozenset(metadata.get("lookups", ()))
    return QuantizedWeights(tensors, stored, metadata["aliases"], left, lookups=lookups)


def _packed(name: str, about: Mapping[str, Any], stored: dict[str, Tensor]) -> PackedTensor:
    """Take one weight's parts out of `stored`."""
    layout = Layout(tuple(about["shape"]), about["axis"], about["groups"])
    bits, levels = stored.pop(f"{name}.bits", about["bits"]), about["levels"]
    size = about["granularity"]
    grid = Grid(
        stored.pop(f"{name}.scale"),
        stored.pop(f"{name}.zero", None),
        row_levels(bits) if isinstance(bits, Tensor) else levels,
        size if isinstance(size, int) else layout.columns,
    )
    data, dtype = stored.pop(f"{name}.q"), getattr(torch, about["dtype"])
    return PackedTensor(data, grid, bits, layout, dtype, about["method"])


def _versions() -> dict[str, str]:
    return {"clipquant": __version__, "torch": torch.__version__}


def _compare(written: QuantizedWeights, read: QuantizedWeights, path: Path) -> None:
    """Raise unless each weight that was read stands for exactly the value that was meant."""
    for name, tensor in written.tensors.items():
        if not torch.equal(dequantize(tensor).cpu(), dequantize(read.tensors[name])):
            raise ArtifactError(f"{path}: read back, {name} differs from what was written.")
