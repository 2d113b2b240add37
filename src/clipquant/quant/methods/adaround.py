"""AdaRound: rounding learned against the float network's outputs, without labels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from clipquant.quant.codes.learned import Rounding
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.error.own_error import OwnError, own_errors
from clipquant.quant.methods.base import Found, Method, Problem, matrix_of, nearest, solved
from clipquant.quant.methods.gptq import Gptq
from clipquant.quant.methods.mse import Mse
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.layers import bias_of, check_finite
from clipquant.quant.network.outputs import distance, outputs_of
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.watches import uses

_BIAS_RATE = 1e-3  # of Adam, in outputs that inputs of unit variance give
_KEPT = 1 << 28  # bytes of float outputs kept for the next pass over the data; others are made anew


@dataclass(frozen=True)
class AdaRound(Method):
    """Learn codes, grids and biases so that the whole network's outputs are those of the float one.

    Each code may move by a step from where its float weight lies, or as far as the first codes were
    moved; no label is read. Unlike the layers' own errors, the network's count what a layer that is run
    many times does to itself. A layer's own error is kept below plain rounding's by a penalty, and if
    that fails by going back to its first codes; what does not lower the outputs' distance over all
    batches is given up.

    Args:
        steps: Steps of Adam; one batch is run at each, with its graph.
        allowed: Share of plain rounding's error in a layer's own outputs at which the penalty sets in.
        gptq: Where to start, but for networks that run a layer many times.
        mse: Where to start then, or where it is nearer.

    Source:
        Nagel et al. 2020, arXiv 2004.10568 (AdaRound); the straight-through offsets are those of Cheng
        et al. 2023, arXiv 2309.05516 (SignRound), the scales of Esser et al. 2019, arXiv 1902.08153 (LSQ).
    """

    steps: int = 200
    allowed: float = 0.9
    gptq: Gptq = field(default_factory=Gptq)
    mse: Mse = field(default_factory=Mse)
    name: ClassVar[str] = "adaround"
    needs_data: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "learns codes, grids and biases until the whole network's outputs are those of the float one"
    )

    def solve(self, problem: Problem) -> Found:
        """Return learned codes, or those that learning started from where it did no better.

        Raises:
            TypeError: If the model's outputs for a batch hold no floating tensor.
        """
        check_finite(problem.targets)
        return self.learned(problem, self._start(problem))

    def _start(self, problem: Problem) -> Found:
        free = solved(self.mse, problem)
        seen = uses(problem.targets, problem.model, problem.data)
        # Layer by layer does not see what a layer that feeds itself does: there, start from plain ranges.
        if any(use.calls > 1 for use in seen.values()):
            return free
        return nearest(problem, solved(self.gptq, problem), free)

    def learned(self, problem: Problem, start: Found) -> Found:
        """Return codes learned from those of `start`, or these where that did no better."""
        network = _Network(problem, start)
        before = network.mean_distance()
        errors = own_errors(Twin(problem.model), problem.targets, problem.specs, problem.data)
        self._learn(network, errors)
        codes, methods = dict(start.codes), dict(start.methods)
        for name, rounding in network.roundings.items():
            coded = rounding.coded()
            if not errors[name].is_harmed(coded.values()):
                codes[name], methods[name] = coded, self.name
        biases = {**start.biases, **network.biases_now()}
        network.freeze_(Found(codes, {}, biases))
        after = network.mean_distance()
        names = [target.name for target in problem.targets]
        if not after < before:
            note = (
                f"learned rounding left out: distance of the outputs {before:.3g}, then {after:.3g}"
            )
            return start.noted(names, note)
        note = f"distance of the outputs {before:.3g}, {after:.3g} after learning"
        return Found(codes, methods, biases, start.notes).noted(names, note)

    def _learn(self, network: _Network, errors: Mapping[str, OwnError]) -> None:
        calibration = network.calibration
        leaves = network.leaves()
        tensors = [leaf.requires_grad_(True) for _, leaf in leaves]
        groups = [{"params": [leaf], "lr": rate, "peak": rate} for rate, leaf in leaves]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))
        step = 0

        def visit(number: int, batch: Any) -> None:
            nonlocal step
            calibration.tell("learned rounding", step, self.steps)
            for params in optimizer.param_groups:
                params["lr"] = params["peak"] * (1 + math.cos(math.pi * step / self.steps)) / 2
            with torch.enable_grad():
                matrices = network.hold_()
                worse = [errors[n].share(w) - self.allowed for n, w in matrices.items()]
                error = network.distance(number, batch) + torch.stack(worse).relu().sum()
                slopes = torch.autograd.grad(error, tensors, allow_unused=True)
            for leaf, slope in zip(tensors, slopes, strict=True):
                leaf.grad = slope
            optimizer.step()
            for rounding in network.roundings.values():
                rounding.limit_()
            step += 1

        calibration.each(visit, _shuffled(len(calibration), self.steps))
        for leaf in tensors:
            leaf.requires_grad_(False)


class _Network:
    """The network whose weights are learned, and the float one that it follows."""

    def __init__(self, problem: Problem, start: Found) -> None:
        self.targets = {target.name: target for target in problem.targets}
        self.calibration: Calibration = problem.data
        self.exact, self.learned = Twin(problem.model), problem.twin(start)
        self.last = problem.targets[-1].name.rpartition(".")[0]
        self.roundings: dict[str, Rounding] = {}
        self.biases: dict[str, Tensor] = {}
        self.units: dict[str, float] = {}
        self.wanted: dict[int, tuple[list[Tensor], Decisions]] = {}
        for target in problem.targets:
            matrix = matrix_of(target)
            self.roundings[target.name] = Rounding.of(matrix, start.codes[target.name])
            bias = bias_of(problem.model, target)
            if bias is not None:
                name = target.name.removesuffix(target.attribute) + bias
                value = start.biases.get(name, parameter_at(problem.model, name))
                self.biases[name] = value.detach()
                self.units[name] = float(matrix.float().square().sum(1).mean().sqrt())
        self.deltas = {n: torch.zeros_like(b, dtype=torch.float32) for n, b in self.biases.items()}

    def leaves(self) -> list[tuple[float, Tensor]]:
        """Return what is learned, each with its rate."""
        learned = [leaf for rounding in self.roundings.values() for leaf in rounding.leaves()]
        return learned + [(_BIAS_RATE, delta) for delta in self.deltas.values()]

    def biases_now(self) -> dict[str, Tensor]:
        return {
            name: (bias + self.deltas[name] * self.units[name]).to(bias.dtype)
            for name, bias in self.biases.items()
        }

    def hold_(self) -> dict[str, Tensor]:
        """Give the learned network its weights and biases as they stand; return the weights as matrices."""
        matrices = {name: rounding.matrix() for name, rounding in self.roundings.items()}
        weights = {n: self.targets[n].layout.unfold(matrix) for n, matrix in matrices.items()}
        self.learned.hold_(self._cast(weights | self.biases_now()))
        return matrices

    def freeze_(self, found: Found) -> None:
        """Give the learned network the weights that some codes stand for."""
        weights = {n: self.targets[n].layout.unfold(c.values()) for n, c in found.codes.items()}
        self.learned.hold_(self._cast({**weights, **self.biases_now()}))

    def _cast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: t.to(parameter_at(self.learned.model, n).dtype) for n, t in tensors.items()}

    def distance(self, number: int, batch: Any) -> Tensor:
        """Return how far the outputs for a batch are from the float network's."""
        wanted, taken = self._wanted(number, batch)
        with taken.followed():
            own = self._outputs(self.learned, batch)
        return distance(own, wanted)

    def mean_distance(self) -> float:
        total = 0.0

        def visit(number: int, batch: Any) -> None:
            nonlocal total
            with torch.no_grad():
                total += float(self.distance(number, batch))

        self.calibration.each(visit)
        return total / len(self.calibration)

    def _outputs(self, twin: Twin, batch: Any) -> list[Tensor]:
        return outputs_of(twin, batch, self.calibration.forward, self.last)

    def _wanted(self, number: int, batch: Any) -> tuple[list[Tensor], Decisions]:
        """Return the float network's outputs, and what it decided on the way."""
        if number in self.wanted:
            return self.wanted[number]
        taken = Decisions()
        with torch.no_grad(), taken.recorded():
            outputs = [t.detach().clone() for t in self._outputs(self.exact, batch)]
        kept = sum(t.nbytes for tensors, _ in self.wanted.values() for t in tensors)
        if kept + sum(t.nbytes for t in outputs) <= _KEPT:
            self.wanted[number] = outputs, taken
        return outputs, taken


def _shuffled(batches: int, steps: int) -> Sequence[int]:
    """Return the numbers of the batches in an order drawn anew for each pass, `steps` in all."""
    generator = torch.Generator("cpu").manual_seed(0)
    order: list[int] = []
    while len(order) < steps:
        order += reversed(torch.randperm(batches, generator=generator, device="cpu").tolist())
    return order[:steps]
