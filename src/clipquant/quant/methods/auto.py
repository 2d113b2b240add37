"""Between several solutions of a whole network, the one whose outputs are nearest to the float ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from clipquant.quant.codes.grid import dequantize_rows
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.methods.gptq import solve_free
from clipquant.quant.methods.layerwise import Calibrated
from clipquant.quant.network.calibration import Forward, call_model
from clipquant.quant.network.layers import Target
from clipquant.quant.network.outputs import distance, outputs_of
from clipquant.quant.network.twin import hold_, twin


def data_free(
    model: nn.Module,
    targets: Sequence[Target],
    specs: Mapping[str, QuantSpec],
    fixed: Mapping[str, QuantizedTensor],
) -> Calibrated:
    """Return the nearest codes on each weight's range of least squared error.

    Args:
        model: Any module; it is not touched.
        targets: Its weights to quantize.
        specs: Name of a weight -> its grid.
        fixed: Weights quantized already, by state-dict key.
    """
    rounded = twin(model)
    hold_(model, rounded, {name: dequantize(tensor) for name, tensor in fixed.items()})
    solutions = {}
    for target in targets:
        found = solve_free(target.layout.fold(target.weight.detach()), specs[target.name], "mse")
        solutions[target.name] = found
        weight = target.layout.unfold(dequantize_rows(found.codes, found.grid))
        hold_(model, rounded, {target.name: weight.to(target.weight.dtype)})
    return Calibrated(solutions, {}, {}, rounded)


def nearest(
    model: nn.Module,
    found: Sequence[Calibrated],
    targets: Sequence[Target],
    batches: Sequence[Any],
    forward: Forward = call_model,
) -> Calibrated:
    """Return the solution whose network's outputs are nearest to the float network's, the first if equal.

    Layer by layer GPTQ is the best known, but a layer that is run many times, feeding itself, can
    end up further from the float network than with plain ranges.

    Args:
        model: The float network.
        found: Solutions to choose from.
        targets: The weights solved; the last one's layer stands for the output where there is no other.
        batches: Calibration inputs.
        forward: Runs a model on a batch.
    """
    if len(found) == 1:
        return found[0]
    exact = twin(model)
    last = targets[-1].name.rpartition(".")[0]
    apart = [0.0] * len(found)
    with torch.no_grad():
        for batch in batches:
            wanted = outputs_of(exact, batch, forward, exact.get_submodule(last))
            for i, one in enumerate(found):
                own = outputs_of(one.model, batch, forward, one.model.get_submodule(last))
                apart[i] += float(distance(own, wanted))
    return found[apart.index(min(apart))]


_PLENTY = 7  # bits from which plain rounding loses nothing that data could save


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
