"""A whole model's weights in, codes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from clipquant.quant.grid import dequantize
from clipquant.quant.layers import Globs, LeftInFloat, Target, check_globs, select
from clipquant.quant.ranges import quantize_weight
from clipquant.quant.spec import Granularity, QuantizedTensor, QuantSpec, check_bits

METHODS = ("auto", "rtn", "mse", "hqq", "gptq", "adaround")


@dataclass(frozen=True)
class QuantizedWeights:
    """A model's state: quantized weights, and every other tensor as it is.

    Args:
        tensors: State-dict key -> quantized weight.
        floats: State-dict key -> any other tensor, of any dtype.
        aliases: Key of a tied tensor -> the key under which it is held.
        left: What stays in float, and why.
    """

    tensors: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    left: tuple[LeftInFloat, ...]

    def state_dict(self) -> dict[str, Tensor]:
        """Return every key of the model's state dict, the quantized weights dequantized."""
        state = {name: dequantize(tensor) for name, tensor in self.tensors.items()}
        state |= self.floats
        return state | {alias: state[name] for alias, name in self.aliases.items()}


def check_method(method: str, known: Sequence[str] = METHODS) -> None:
    """Raise unless `method` is a known one.

    >>> check_method("awq")
    Traceback (most recent call last):
    ...
    ValueError: method must be one of 'auto', 'rtn', 'mse', 'hqq', 'gptq', 'adaround'; got 'awq'.
    """
    if method not in known:
        raise ValueError(f"method must be one of {', '.join(map(repr, known))}; got {method!r}.")


def quantize_weights(
    model: nn.Module,
    bits: int = 8,
    *,
    levels: int | None = None,
    symmetric: bool | None = None,
    granularity: Granularity = "channel",
    include: Globs = None,
    exclude: Globs = None,
    overrides: Mapping[str, int] | None = None,
) -> QuantizedWeights:
    """Return the weights of `model` rounded to their min-max grids; the model is not touched.

    Args:
        model: Any module.
        bits: Width of a code, 1 to 8.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle.
        granularity: "tensor", "channel" or a group size.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.

    Raises:
        ValueError: For an impossible grid, a glob without a match, a model without weights to
            quantize, or weights that are not finite.

    >>> weights = quantize_weights(nn.Linear(3, 2), bits=4)
    >>> sorted(weights.tensors), sorted(weights.floats)
    (['weight'], ['bias'])
    """
    spec = QuantSpec(bits, levels, symmetric, granularity)
    selection = select(model, include, exclude)
    specs = specs_for(selection.targets, spec, overrides)
    check_finite(selection.targets)
    tensors = {
        target.name: quantize_weight(target.weight, specs[target.name], target.layout)
        for target in selection.targets
    }
    return QuantizedWeights(
        tensors, rest_of(model, tensors, selection.aliases), selection.aliases, selection.left
    )


def specs_for(
    targets: Iterable[Target], spec: QuantSpec, overrides: Mapping[str, int] | None
) -> dict[str, QuantSpec]:
    """Return each weight's grid: `spec`, or with the bits of the first override that matches."""
    names = [target.name for target in targets]
    check_globs(names, overrides=overrides)
    for bits in (overrides or {}).values():
        check_bits(bits)
    specs = {}
    for name in names:
        own = next((b for g, b in (overrides or {}).items() if fnmatchcase(name, g)), None)
        specs[name] = spec if own is None else _with_bits(spec, own)
    return specs


def _with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    if spec.bits == bits:
        return spec
    return QuantSpec(bits, None, spec.symmetric if bits > 1 else False, spec.granularity)


def check_finite(targets: Iterable[Target]) -> None:
    """Raise for weights that hold NaN or infinity, naming every such tensor and its count."""
    bad = []
    for target in targets:
        low, high = target.weight.detach().aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            count = int((~torch.isfinite(target.weight)).sum())
            bad.append(f"{target.name} ({count} of {target.weight.numel()})")
    if bad:
        raise ValueError(
            f"weights must be finite to have a grid; NaN or infinity in {', '.join(bad)}. "
            "Train with a smaller step or clipped gradients, or exclude these weights."
        )


def rest_of(
    model: nn.Module, taken: Iterable[str], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return copies of the tensors of a state dict that are neither quantized nor tied."""
    taken = set(taken) | set(aliases)
    state = model.state_dict()
    return {
        name: tensor.detach().clone().contiguous()
        for name, tensor in state.items()
        if name not in taken and isinstance(tensor, Tensor)
    }
