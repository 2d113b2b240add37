"""Rounding learned against the float network's outputs, without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import dequantize_rows
from clipquant.quant.codes.learned import Rounding
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.own_error import OwnError, own_errors
from clipquant.quant.methods.gptq import Solution
from clipquant.quant.methods.layerwise import Calibrated
from clipquant.quant.network.calibration import Forward, Progress, call_model
from clipquant.quant.network.layers import Target, bias_of
from clipquant.quant.network.outputs import distance, outputs_of
from clipquant.quant.network.twin import hold_, twin

STEPS = 200
_BIAS_RATE = 1e-3  # of Adam, in outputs that inputs of unit variance give
_ALLOWED = 0.9  # of plain rounding's error in a layer's own outputs, before the penalty sets in
_KEPT = 1 << 28  # bytes of float outputs kept for the next pass over the data; others are made anew


def adaround(
    model: nn.Module,
    targets: Sequence[Target],
    specs: Mapping[str, QuantSpec],
    start: Calibrated,
    batches: Sequence[Any],
    *,
    forward: Forward = call_model,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> Calibrated:
    """Return codes, grids and biases learned so that the whole network's outputs are those of the float one.

    Each code may move by a step from where its float weight lies, or as far as the first codes were
    moved; no label is read. Unlike the layers' own errors, the network's count what a layer that is run
    many times does to itself. A layer's own error is kept below plain rounding's by a penalty, and if
    that fails by going back to its first codes; what does not lower the outputs' distance over all
    batches is given up.

    Args:
        model: Any module; it is not touched.
        targets: Its weights, all with a solution in `start`.
        specs: Name of a weight -> its grid.
        start: Where to start.
        batches: Calibration inputs; one is run at a time, with its graph.
        forward: Runs a model on a batch.
        steps: Steps of Adam.
        progress: Told before each step.

    Raises:
        TypeError: If the model's outputs for a batch hold no floating tensor.

    Source:
        Nagel et al. 2020, arXiv 2004.10568 (AdaRound); the straight-through offsets are those of Cheng
        et al. 2023, arXiv 2309.05516 (SignRound), the scales of Esser et al. 2019, arXiv 1902.08153 (LSQ).
    """
    network = _Network.of(model, targets, start, forward)
    before = network.mean_distance(batches)
    errors = own_errors(network.exact, targets, specs, batches, forward)
    _learn(network, errors, batches, steps, progress)
    checked = {
        name: _solution(rounding, start.solutions[name], errors[name])
        for name, rounding in network.roundings.items()
    }
    network.freeze_(checked)
    after = network.mean_distance(batches)
    if not after < before:
        note = f"learned rounding left out: distance of the outputs {before:.3g}, then {after:.3g}"
        return replace(start, notes=_noted(start.notes, targets, note))
    note = f"distance of the outputs {before:.3g}, {after:.3g} after learning"
    biases = dict(start.biases) | network.biases_now()
    return Calibrated(checked, biases, _noted(start.notes, targets, note), network.learned)


@dataclass
class _Network:
    """The network whose weights are learned, and the float one that it follows."""

    exact: nn.Module
    learned: nn.Module
    targets: Mapping[str, Target]
    forward: Forward
    roundings: dict[str, Rounding]
    biases: dict[str, Tensor]
    units: dict[str, float]
    deltas: dict[str, Tensor]
    last: str
    wanted: dict[int, list[Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, model: nn.Module, targets: Sequence[Target], start: Calibrated, forward: Forward
    ) -> _Network:
        roundings, biases, units = {}, {}, {}
        for target in targets:
            found = start.solutions[target.name]
            matrix = target.layout.fold(target.weight.detach())
            roundings[target.name] = Rounding.of(matrix, found.codes, found.grid)
            bias = bias_of(model, target)
            if bias is not None:
                name = target.name.removesuffix(target.attribute) + bias
                value = start.biases.get(name, model.get_parameter(name))
                biases[name] = value.detach()
                units[name] = float(matrix.float().square().sum(1).mean().sqrt())
        last = targets[-1].name.rpartition(".")[0]
        deltas = {
            name: torch.zeros_like(bias, dtype=torch.float32) for name, bias in biases.items()
        }
        own = {t.name: t for t in targets}
        return cls(
            twin(model), twin(start.model), own, forward, roundings, biases, units, deltas, last
        )

    def leaves(self) -> list[tuple[float, Tensor]]:
        """Return what is learned, each with its rate."""
        found = [leaf for rounding in self.roundings.values() for leaf in rounding.leaves()]
        return found + [(_BIAS_RATE, delta) for delta in self.deltas.values()]

    def biases_now(self) -> dict[str, Tensor]:
        return {
            name: (bias + self.deltas[name] * self.units[name]).to(bias.dtype)
            for name, bias in self.biases.items()
        }

    def hold_(self) -> dict[str, Tensor]:
        """Give the learned network its weights and biases as they stand; return the weights as matrices."""
        matrices = {name: rounding.matrix() for name, rounding in self.roundings.items()}
        weights = {n: self.targets[n].layout.unfold(matrix) for n, matrix in matrices.items()}
        hold_(self.exact, self.learned, self._cast(weights | self.biases_now()))
        return matrices

    def freeze_(self, solutions: Mapping[str, Solution]) -> None:
        """Give the learned network the weights that some codes stand for, as parameters."""
        weights = {
            name: self.targets[name].layout.unfold(dequantize_rows(found.codes, found.grid))
            for name, found in solutions.items()
        }
        tensors = weights | self.biases_now()
        parameters = {n: nn.Parameter(t, False) for n, t in self._cast(tensors).items()}
        hold_(self.exact, self.learned, parameters)

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(self.exact.get_parameter(n).dtype) for n, t in tensors.items()}

    def distance(self, number: int, batch: Any) -> Tensor:
        """Return how far the outputs for a batch are from the float network's."""
        return distance(self._outputs(self.learned, batch), self._wanted(number, batch))

    def mean_distance(self, batches: Sequence[Any]) -> float:
        with torch.no_grad():
            return sum(float(self.distance(n, b)) for n, b in enumerate(batches)) / len(batches)

    def _outputs(self, model: nn.Module, batch: Any) -> list[Tensor]:
        return outputs_of(model, batch, self.forward, model.get_submodule(self.last))

    def _wanted(self, number: int, batch: Any) -> list[Tensor]:
        if number in self.wanted:
            return self.wanted[number]
        with torch.no_grad():
            found = [t.detach().clone() for t in self._outputs(self.exact, batch)]
        kept = sum(t.nbytes for tensors in self.wanted.values() for t in tensors)
        if kept + sum(t.nbytes for t in found) <= _KEPT:
            self.wanted[number] = found
        return found


def _learn(
    network: _Network,
    errors: Mapping[str, OwnError],
    batches: Sequence[Any],
    steps: int,
    progress: Progress | None,
) -> None:
    leaves = network.leaves()
    tensors = [leaf.requires_grad_(True) for _, leaf in leaves]
    groups = [{"params": [leaf], "lr": rate, "peak": rate} for rate, leaf in leaves]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(0)
    order: list[int] = []
    for step in range(steps):
        if progress is not None:
            progress("learned rounding", step, steps)
        for params in optimizer.param_groups:
            params["lr"] = params["peak"] * (1 + math.cos(math.pi * step / steps)) / 2
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        number = order.pop()
        with torch.enable_grad():
            weights = network.hold_()
            worse = torch.stack([errors[n].share(w) - _ALLOWED for n, w in weights.items()])
            error = network.distance(number, batches[number]) + worse.relu().sum()
            slopes = torch.autograd.grad(error, tensors, allow_unused=True)
        for leaf, slope in zip(tensors, slopes, strict=True):
            leaf.grad = slope
        optimizer.step()
        for rounding in network.roundings.values():
            rounding.limit_()
    for leaf in tensors:
        leaf.requires_grad_(False)


def _solution(rounding: Rounding, start: Solution, own: OwnError) -> Solution:
    """Return the codes learned and their error, or those of `start` where plain rounding would do better."""
    codes, grid = rounding.codes(), rounding.learned_grid()
    error = own.relative(dequantize_rows(codes, grid))
    if error > own.relative_plain:
        return start
    return Solution(codes, grid, "adaround", error, own.relative_plain)


def _noted(
    notes: Mapping[str, tuple[str, ...]], targets: Sequence[Target], note: str
) -> dict[str, tuple[str, ...]]:
    return {**notes, **{t.name: (*notes.get(t.name, ()), note) for t in targets}}
