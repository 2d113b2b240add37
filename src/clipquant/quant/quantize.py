"""A whole model's weights in, codes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from clipquant.quant.codes.ranges import quantize_weight
from clipquant.quant.codes.spec import Granularity, QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, from_codes
from clipquant.quant.codes.weights import QuantizedWeights, rest_of
from clipquant.quant.methods.adaround import adaround
from clipquant.quant.methods.auto import data_free, method_for, nearest
from clipquant.quant.methods.gptq import Solution, solve_free
from clipquant.quant.methods.layerwise import Calibrated, calibrate, seen_uses
from clipquant.quant.network.batchnorm import followed, settled_statistics
from clipquant.quant.network.calibration import Forward, Progress, call_model
from clipquant.quant.network.layers import Globs, Target, check_finite, select
from clipquant.quant.recipe import CALIBRATED, check_method, specs_for


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


def _free_tensor(target: Target, spec: QuantSpec, method: str) -> QuantizedTensor:
    if method == "rtn":
        return quantize_weight(target.weight, spec, target.layout)
    matrix = target.layout.fold(target.weight.detach())
    return _tensor_of(target, spec, solve_free(matrix, spec, method))


def _tensor_of(target: Target, spec: QuantSpec, found: Solution) -> QuantizedTensor:
    return from_codes(
        found.codes, found.grid, spec.width, target.layout, target.weight.dtype, found.method
    )
