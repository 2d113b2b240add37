"""A whole model's weights in, codes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.adaround import adaround
from clipquant.quant.batchnorm import batch_norms, reestimate
from clipquant.quant.calibrate import Calibrated, Progress, calibrate, hold_, seen_uses
from clipquant.quant.choose import data_free, nearest
from clipquant.quant.forward import Forward, call_model, twin
from clipquant.quant.grid import dequantize, from_codes
from clipquant.quant.layers import Globs, LeftInFloat, Target, check_globs, select
from clipquant.quant.ranges import quantize_weight
from clipquant.quant.solve import Solution, solve_free
from clipquant.quant.spec import Granularity, QuantizedTensor, QuantSpec, check_bits

METHODS = ("auto", "rtn", "mse", "hqq", "gptq", "adaround")
CALIBRATED = ("gptq", "adaround")  # these need data

_PLENTY = 7  # bits from which plain rounding loses nothing that data could save


@dataclass(frozen=True)
class QuantizedWeights:
    """A model's state: quantized weights, and every other tensor as it is.

    Args:
        tensors: State-dict key -> quantized weight.
        floats: State-dict key -> any other tensor, of any dtype.
        aliases: Key of a tied tensor -> the key under which it is held.
        left: What stays in float, and why.
        notes: State-dict key -> what the reader should know of a weight, such as a fallback.
    """

    tensors: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    left: tuple[LeftInFloat, ...]
    notes: Mapping[str, str] = field(default_factory=dict)

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
    method: str = "auto",
    include: Globs = None,
    exclude: Globs = None,
    overrides: Mapping[str, int] | None = None,
    batches: Sequence[Any] | None = None,
    forward: Forward = call_model,
    progress: Progress | None = None,
) -> QuantizedWeights:
    """Return the weights of `model` as codes on their grids; the model is not touched.

    Args:
        model: Any module.
        bits: Width of a code, 1 to 8.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle.
        granularity: "tensor", "channel" or a group size.
        method: "rtn", "mse" and "hqq" look at the weights alone; "gptq" and "adaround" need batches;
            "auto" takes "rtn" from 7 bits up, else "mse" without batches and with them the one of
            "gptq" and "mse" that keeps the network's outputs better.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.
        batches: Calibration inputs, each as `forward` takes it. None: data-free.
        forward: Runs a model on a batch; the model it gets is a copy in eval mode.
        progress: Told the weight's name, the steps done and the steps in all, before each step.

    Raises:
        ValueError: For an impossible grid, a glob without a match, a model without weights to
            quantize, weights or activations that are not finite, or a method that lacks its batches.
        RuntimeError: If the model cannot run on a batch.

    >>> weights = quantize_weights(nn.Linear(3, 2), bits=4)
    >>> sorted(weights.tensors), sorted(weights.floats)
    (['weight'], ['bias'])
    """
    check_method(method)
    if method in CALIBRATED and not batches:
        raise ValueError(
            f"method={method!r} calibrates on data; got none. Pass data (or calibration_batches above "
            "0), or choose 'rtn', 'mse' or 'hqq'."
        )
    selection = select(model, include, exclude)
    specs = specs_for(selection.targets, QuantSpec(bits, levels, symmetric, granularity), overrides)
    methods = {name: method_for(method, spec, bool(batches)) for name, spec in specs.items()}
    if set(methods.values()) != {"rtn"}:
        check_finite(selection.targets)
    free = [t for t in selection.targets if methods[t.name] not in CALIBRATED]
    tensors = {t.name: _free_tensor(t, specs[t.name], methods[t.name]) for t in free}
    if not all(bool(tensor.scale.isfinite().all()) for tensor in tensors.values()):
        check_finite(selection.targets)  # a weight that is not finite leaves no finite step
    found = Calibrated({}, {}, {}, model)
    rest = [t for t in selection.targets if methods[t.name] in CALIBRATED]
    if rest and batches:
        found = _calibrated(model, method, rest, specs, batches, tensors, forward, progress)
    for target in rest:
        tensors[target.name] = _tensor_of(target, specs[target.name], found.solutions[target.name])
    statistics = settled_statistics(model, tensors, found.biases, batches or (), forward)
    floats = rest_of(model, tensors, selection.aliases)
    changed = {**found.biases, **statistics}
    return QuantizedWeights(
        {t.name: tensors[t.name] for t in selection.targets},
        floats | {name: tensor for name, tensor in changed.items() if name in floats},
        selection.aliases,
        tuple(followed(item) if item.name in statistics else item for item in selection.left),
        {name: "; ".join(notes) for name, notes in found.notes.items()},
    )


def _calibrated(
    model: nn.Module,
    method: str,
    targets: Sequence[Target],
    specs: Mapping[str, QuantSpec],
    batches: Sequence[Any],
    fixed: Mapping[str, QuantizedTensor],
    forward: Forward,
    progress: Progress | None,
) -> Calibrated:
    """Return the codes by a method that needs data: "gptq", "adaround" or "auto"."""
    # Layer by layer does not see what a layer that feeds itself does: there, learning starts from plain ranges.
    uses = seen_uses(model, targets, batches, forward).values() if method == "adaround" else ()
    found = data_free(model, targets, specs, fixed) if method != "gptq" else None
    if found is None or not any(use.calls > 1 for use in uses):
        layered = calibrate(
            model, targets, specs, batches, fixed=fixed, forward=forward, progress=progress
        )
        others = (layered,) if found is None else (layered, found)
        found = nearest(model, others, targets, batches, forward)
    if method == "adaround":
        found = adaround(model, targets, specs, found, batches, forward=forward, progress=progress)
    return found


def settled_statistics(
    model: nn.Module,
    tensors: Mapping[str, QuantizedTensor],
    biases: Mapping[str, Tensor],
    batches: Sequence[Any],
    forward: Forward,
) -> dict[str, Tensor]:
    """Return the BatchNorm statistics that suit the quantized weights better than the model's own."""
    if not batches or not batch_norms(model):
        return {}
    exact, rounded = twin(model), twin(model)
    hold_(exact, rounded, {name: dequantize(tensor) for name, tensor in tensors.items()})
    hold_(exact, rounded, biases)
    return reestimate(exact, rounded, batches, forward)


def followed(item: LeftInFloat) -> LeftInFloat:
    """Return the entry of a statistic that was estimated anew."""
    return replace(item, why="BatchNorm statistic, re-estimated for the quantized weights")


def method_for(method: str, spec: QuantSpec, data: bool) -> str:
    """Return the method that "auto" stands for, on a grid, with data or without; any other as it is.

    >>> method_for("auto", QuantSpec(bits=3), data=True)
    'gptq'
    """
    if method != "auto":
        return method
    if spec.width >= _PLENTY or (spec.granularity == "tensor" and spec.levels is not None):
        return "rtn"
    return "gptq" if data else "mse"


def _free_tensor(target: Target, spec: QuantSpec, method: str) -> QuantizedTensor:
    if method == "rtn":
        return quantize_weight(target.weight, spec, target.layout)
    matrix = target.layout.fold(target.weight.detach())
    return _tensor_of(target, spec, solve_free(matrix, spec, method))


def _tensor_of(target: Target, spec: QuantSpec, found: Solution) -> QuantizedTensor:
    return from_codes(
        found.codes, found.grid, spec.width, target.layout, target.weight.dtype, found.method
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
