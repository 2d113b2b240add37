"""Rounding learned against the float network's outputs, without labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.calibrate import Calibrated, Progress, bias_of, hold_
from clipquant.quant.grid import dequantize_rows
from clipquant.quant.layers import Target
from clipquant.quant.observe import HESSIAN_LIMIT, Forward, call_model, observe, twin
from clipquant.quant.outputs import distance, outputs_of
from clipquant.quant.rounding import Rounding
from clipquant.quant.solve import Solution, plain_rounding, relative_error
from clipquant.quant.spec import QuantSpec

STEPS = 200
_RATES = {
    "offset": 2e-2,
    "grid": 1e-3,
    "bias": 1e-3,
}  # of Adam: in steps, in logs of scale, in outputs
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
    moved; no label is read. What does not lower the outputs' distance over all batches is given up, and
    so are the codes of a layer whose own output error would exceed plain rounding's. Other than the
    layers' own errors, it counts what a layer that is run many times does to itself.

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
    _learn(network, batches, steps, progress)
    found = {name: _solution(r, start.solutions[name]) for name, r in network.roundings.items()}
    network.freeze_(found)
    checked = _checked(network, found, start.solutions, specs, batches)
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

    def leaves(self) -> list[tuple[str, Tensor]]:
        """Return what is learned, each with the name of its rate."""
        found = [leaf for rounding in self.roundings.values() for leaf in rounding.leaves()]
        return found + [("bias", delta) for delta in self.deltas.values()]

    def biases_now(self) -> dict[str, Tensor]:
        return {
            name: (bias + self.deltas[name] * self.units[name]).to(bias.dtype)
            for name, bias in self.biases.items()
        }

    def hold_(self) -> None:
        """Give the learned network its weights and biases as they stand, with their graph."""
        weights = {
            name: self.targets[name].layout.unfold(rounding.matrix())
            for name, rounding in self.roundings.items()
        }
        hold_(self.exact, self.learned, self._cast(weights | self.biases_now()))

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
    network: _Network, batches: Sequence[Any], steps: int, progress: Progress | None
) -> None:
    leaves = network.leaves()
    tensors = [leaf.requires_grad_(True) for _, leaf in leaves]
    groups = [{"params": [leaf], "lr": _RATES[kind], "peak": _RATES[kind]} for kind, leaf in leaves]
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
            network.hold_()
            error = network.distance(number, batches[number])
            slopes = torch.autograd.grad(error, tensors, allow_unused=True)
        for leaf, slope in zip(tensors, slopes, strict=True):
            leaf.grad = slope
        optimizer.step()
        for rounding in network.roundings.values():
            rounding.limit_()
    for leaf in tensors:
        leaf.requires_grad_(False)


def _solution(rounding: Rounding, start: Solution) -> Solution:
    return replace(start, codes=rounding.codes(), grid=rounding.learned_grid(), method="adaround")


def _checked(
    network: _Network,
    found: Mapping[str, Solution],
    start: Mapping[str, Solution],
    specs: Mapping[str, QuantSpec],
    batches: Sequence[Any],
) -> dict[str, Solution]:
    """Return the solutions with their errors; those of `start` where plain rounding would do better."""
    checked = {}
    for part in _in_parts(list(network.targets.values())):
        moments = observe((network.exact, network.learned), part, batches, network.forward)
        for target in part:
            centred = bias_of(network.exact, target) is not None
            matrix = target.layout.fold(target.weight.detach())
            seen = moments.get(target.name)
            own = found[target.name]
            plain = plain_rounding(matrix, specs[target.name])
            error, most = (
                relative_error(matrix, codes, grid, seen, centred)
                for codes, grid in ((own.codes, own.grid), plain)
            )
            kept = replace(own, error=error, rtn_error=most)
            checked[target.name] = kept if error <= most else start[target.name]
    return checked


def _in_parts(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield targets whose second moments together stay within the limit for one."""
    part: list[Target] = []
    room = HESSIAN_LIMIT
    for target in targets:
        need = 4 * target.layout.columns**2
        if part and need > room:
            yield part
            part, room = [], HESSIAN_LIMIT
        part.append(target)
        room -= need
    if part:
        yield part


def _noted(
    notes: Mapping[str, tuple[str, ...]], targets: Sequence[Target], note: str
) -> dict[str, tuple[str, ...]]:
    return {**notes, **{t.name: (*notes.get(t.name, ()), note) for t in targets}}
