"""A file loaded: into a state dict, or into a model that it fits."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

from clipquant.artifact.content import parse, weights_of
from clipquant.artifact.envelope import open_sealed, read_bytes
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.weights import Parts, packed_weight, unpacked_weight
from clipquant.errors import ArgumentError, ArgumentTypeError
from clipquant.quant.network.bare import on_bare


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
    than those of `model`; without one they may come to 32 MB and twice the file, and codes in an entropy
    code beyond 8 a byte to a quarter of that.

    Args:
        path: A file written by `QuantizedModel.save` or `QuantizeOnFitEnd`.
        model: A module of the architecture that was saved. Left untouched unless all fits.
        packed: Whether `model` is to hold its weights packed, as the file does, and dequantize a
            layer at a time when it runs: about the file's size in memory, the same outputs, and
            weights that cannot be trained. It may have been built under `torch.device("meta")`.
        max_constant_bytes: Without a model, most bytes that rows of 0 bits, or codes beyond 8 a byte, may
            come to. None: as said above.

    Returns:
        Without `model`: every key of the saved model's state dict -> tensor, for
        `load_state_dict`. With it: `model` itself.

    Raises:
        ArtifactError: If the file is missing, damaged or of a newer format, if its codes stand in an entropy
            code and the extra `clipquant[entropy]` is not installed, or if `model` differs
            from what was saved (names the missing, the unexpected and the misshapen tensors).
        ValueError: If `packed` is asked for without a model.
        TypeError: If the two arguments are swapped, or `model` is a class.

    >>> load_quantized("none.safetensors")
    Traceback (most recent call last):
    ...
    clipquant.artifact.fault.ArtifactError: none.safetensors cannot be read: no such file or \
directory.
    """
    _check_types(path, model)
    if model is None:
        if packed:
            raise ArgumentError(
                "packed=True needs a model to hold the packed weights; got model=None. "
                "Pass a module, or leave packed out for a state dict."
            )
        return parse(read_bytes(path), path, {}, max_constant_bytes).weights.state_dict()
    parts = Parts(open_sealed(read_bytes(path), path), path)
    _load(model, parts, packed)
    return model


@on_bare
def _load(model: nn.Module, parts: Parts, packed: bool) -> None:
    """Load a file into a model that it fits."""
    manifest, path = parts.opened.manifest, str(parts.path)
    _check_fit(model, manifest.shapes, path)
    if packed:
        _load_packed(parts, model)
        return
    tensors = {name: unpacked_weight(parts, name) for name in manifest.weights}
    load_state(model, weights_of(parts, tensors).state_dict(), path)


def _check_types(path: object, model: object) -> None:
    """Raise where the arguments are swapped or a class stands for its instance."""
    if not isinstance(path, str | os.PathLike):
        raise ArgumentTypeError(
            f"load_quantized takes the file first and then the model; got {_kind(path)} as the file. "
            'Write load_quantized("model.safetensors", model).'
        )
    if model is not None:
        check_fillable(model)


def check_fillable(model: object) -> None:
    """Raise unless there is a module whose weights can be filled."""
    if not isinstance(model, nn.Module):
        remedy = f"{model.__name__}(...)" if isinstance(model, type) else "a torch.nn.Module"
        raise ArgumentTypeError(
            f"model must be a module with weights to fill; got {_kind(model)}. Pass {remedy}."
        )


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


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
    check_fillable(model)
    _fill_(model, state, source)
    return model


@on_bare
def _fill_(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    _check_fit(model, {name: tuple(tensor.shape) for name, tensor in state.items()}, source)
    _check_filled(model, state, source)
    model.load_state_dict(dict(state), strict=False, assign=_on_meta(model))


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
            f"{_moved(set(own), set(shapes)) or 'Build the model with the arguments it was trained with.'}"
        )


def _moved(own: set[str], held: set[str]) -> str:
    """Return that one of two sets of keys is the other under a prefix, and the remedy; empty where it is not."""
    for inner, outer in ((own, held), (held, own)):
        ends = (
            [name.removesuffix(min(inner)) for name in outer if name.endswith(min(inner))]
            if inner
            else []
        )
        for prefix in filter(None, ends):
            if {prefix + name for name in inner} <= outer:
                whole = "the file" if outer is held else "the model"
                return (
                    f"The keys of {whole} begin with {prefix!r}: one is the other's attribute {prefix.rstrip('.')!r}. "
                    "Load into the module that was quantized, or quantize the one that is to be loaded."
                )
    return ""
