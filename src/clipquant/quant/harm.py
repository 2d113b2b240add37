"""Which weights' rounding likely harms the network: by what is left of the weight, or of its layer's outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.codes.granularity import NORMAL, SHORT
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.methods.base import Found, Problem, matrix_of
from clipquant.quant.network.batchnorm import batch_norms
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import bias_of
from clipquant.quant.network.moments import Finite, inputs_met, places_of
from clipquant.quant.network.patches import patches
from clipquant.quant.network.twin import Twin
from clipquant.quant.widths.allocator import Allocator

LEAST = 12.0  # dB: below, a sixteenth of a weight's energy is noise, whatever its width
ENOUGH = 16.0  # dB: above, a fortieth: no width is asked for more
MOST = 0.2  # of the variance of a layer's outputs
_BATCHES = 2
_POSITIONS = 1024  # of one call


def harms(bits: float, sqnr_db: float, output_error: float | None = None) -> str:
    """Return why a weight's rounding likely harms the network; empty where nothing says so.

    Where the outputs of the weight's layer were compared with the float network's, more than a fifth of
    their variance in error says so. Where they were not, the weight's signal-to-noise ratio does: below
    16 dB, a fortieth of its energy, where normally distributed weights would keep 3 dB more at that
    width (so that a few large weights cost all others their codes); and below 12 dB at any width.

    Args:
        bits: Width of its codes; the mean where rows differ.
        sqnr_db: Signal to quantization noise of the weight; NaN where it is not known.
        output_error: See `output_errors`.

    >>> harms(8, 40.0), harms(4, 15.0)
    ('', '15.0 dB SQNR')
    >>> harms(4, 15.0, output_error=0.01), harms(2, 10.0, output_error=0.5)
    ('', '50 % error of its outputs')
    """
    if output_error is not None:
        return f"{100 * output_error:.0f} % error of its outputs" if output_error > MOST else ""
    wanted = max(LEAST, min(ENOUGH, NORMAL.get(int(bits), math.inf) - SHORT))
    return f"{sqnr_db:.1f} dB SQNR" if sqnr_db < wanted else ""


def output_errors(
    problem: Problem, found: Found, statistics: Mapping[str, Tensor], calibration: Calibration
) -> dict[str, float]:
    """Return how far each layer's outputs are from the float network's, as a share of their variance.

    The quantized layer meets the quantized network's inputs. Where it has a bias the mean error is left
    out. Two batches are run, of those that nothing was fitted to where there are any.

    Args:
        problem: The float network and what was to be quantized.
        found: The codes.
        statistics: Buffers that follow the codes: state-dict key -> value.
        calibration: Batches, and how to run them.

    Returns:
        Name of a weight -> squared error over variance; weights that no batch reaches are not in it.
    """
    exact, rounded = Twin(problem.model), problem.twin(found)
    rounded.hold_(statistics)
    held = {
        t.name: (matrix_of(t).float(), found.codes[t.name].values().float())
        for t in problem.targets
    }
    sums = {name: _Difference() for name in held}
    places = places_of(exact, problem.targets)
    checks = Finite()

    def visit(number: int, batch: Any) -> None:
        floats, others = inputs_met((exact, rounded), places, batch, calibration, number, checks)
        for name, inputs in others.items():
            for (place, x), (_, f) in zip(inputs, floats.get(name, ()), strict=False):
                for a, b in zip(patches(place, x), patches(place, f), strict=True):
                    sums[name].add_(_few(a), _few(b), *held[name])

    numbers = list(calibration.apart or range(len(calibration)))
    try:
        calibration.each(visit, numbers[:_BATCHES])
        checks.check()
    except ArgumentError:  # outputs that are not finite have no error to speak of
        return {}
    return {
        t.name: sums[t.name].share(bias_of(problem.model, t) is not None)
        for t in problem.targets
        if sums[t.name].count
    }


def allocated_errors(allocator: Allocator, weights: QuantizedWeights) -> dict[str, float]:
    """Return the same of weights with bits of their own for each row.

    Args:
        allocator: What they were taken from; without calibration nothing is measured.
        weights: Its weights, settled.

    Returns:
        Name of a weight -> squared error over variance; looked-up weights are not in it.
    """
    calibration, model = allocator.calibration, allocator.model
    if not calibration:
        return {}
    targets = tuple(t for t in allocator.selection.targets if t.name not in weights.lookups)
    problem = Problem(model, targets, {}, calibration)
    codes = {t.name: weights.tensors[t.name].coded for t in targets}
    found = Found(codes, biases={n: weights.floats[n] for n in allocator.biases.values()})
    names = (f"{n}.{part}" for n in batch_norms(model) for part in ("running_mean", "running_var"))
    statistics = {name: weights.floats[name] for name in names if name in weights.floats}
    return output_errors(problem, found, statistics, calibration)


class _Difference:
    """Running sums of a layer's outputs and of their error."""

    def __init__(self) -> None:
        self.count = 0

    def add_(self, x: Tensor, f: Tensor, matrix: Tensor, values: Tensor) -> None:
        groups, positions, columns = f.shape
        matrix, values = matrix.to(f.device), values.to(f.device)
        wanted = f @ matrix.reshape(groups, -1, columns).mT
        off = x @ values.reshape(groups, -1, columns).mT - wanted
        parts = [part for y in (wanted, off) for part in (y.sum(1), y.square().sum())]
        if not self.count:
            self.sums = parts
        else:
            self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)]
        self.count += positions

    def share(self, centred: bool) -> float:
        mean, energy, shift, error = self.sums
        variance = float(energy - mean.square().sum() / self.count)
        lost = float(error - (shift.square().sum() / self.count if centred else 0.0))
        floor = 1e-6 * float(energy)  # what rounding leaves of outputs that do not vary
        return max(lost, 0.0) / max(variance, floor) if energy > 0 else 0.0


def _few(x: Tensor) -> Tensor:
    """Return evenly spaced positions of (groups, positions, columns)."""
    return x[:, :: max(x.shape[1] // _POSITIONS, 1) | 1]
