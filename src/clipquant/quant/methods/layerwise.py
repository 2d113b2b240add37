"""Layer after layer: each weight's codes from its inputs in the network quantized so far."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import dequantize_rows
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.methods.gptq import Solution, solve, solve_free
from clipquant.quant.network.calibration import Forward, Progress, call_model
from clipquant.quant.network.layers import Target, bias_of, is_lookup
from clipquant.quant.network.moments import Moments, Use, observe, uses, watches_of
from clipquant.quant.network.twin import hold_, twin

MOST_PASSES = 24  # passes over the calibration data; deeper networks observe several layers in one


@dataclass(frozen=True)
class Calibrated:
    """What calibration found: each weight's solution, the biases it corrected, what is worth saying.

    Args:
        solutions: Name of a weight -> its codes and their error.
        biases: Name of a bias -> its new value.
        notes: Name of a weight -> remarks for the report.
        model: The network with the quantized weights and corrected biases, in eval mode.
    """

    solutions: Mapping[str, Solution]
    biases: Mapping[str, Tensor]
    notes: Mapping[str, tuple[str, ...]]
    model: nn.Module


def calibrate(
    model: nn.Module,
    targets: Sequence[Target],
    specs: Mapping[str, QuantSpec],
    batches: Sequence[Any],
    *,
    fixed: Mapping[str, QuantizedTensor] | None = None,
    forward: Forward = call_model,
    progress: Progress | None = None,
) -> Calibrated:
    """Return the codes of every weight, found on inputs that come from the weights quantized before it.

    Each weight is asked for the float network's outputs on the quantized network's inputs, so errors are
    made up for down the network. A weight that is used several times in one pass (a shared layer) changes
    its own inputs and is therefore solved a second time.

    Args:
        model: Any module; it is not touched.
        targets: Its weights to quantize.
        specs: Name of a weight -> its grid.
        batches: Calibration inputs.
        fixed: Weights quantized already, by state-dict key.
        forward: Runs a model on a batch.
        progress: Told before each step.

    Raises:
        ValueError: If a layer's inputs are NaN or infinite.
        RuntimeError: If the forward pass raises, naming the batch.

    Source:
        Inputs of the quantized prefix against outputs of the float network: GPTAQ, arXiv 2504.02692.
    """
    exact, rounded = twin(model), twin(model)
    own = {t.name: t for t in targets}
    seen = seen_uses(exact, targets, batches, forward)
    run = _Run(exact, rounded, specs, {}, {}, {})
    for name, tensor in (fixed or {}).items():
        run.hold_(name, dequantize(tensor))
    steps = list(_steps(own, seen))
    free = [name for name in own if name not in seen]
    for name in free:
        run.solve_free_(own[name], _why_free(exact, own[name]))
    for number, group in enumerate(steps):
        if progress is not None:
            progress(group[0].name, number, len(steps))
        moments = observe((exact, rounded), group, batches, forward)
        for target in group:
            run.solve_(target, moments[target.name])
    return Calibrated(
        run.solutions, run.biases, {k: tuple(v) for k, v in run.notes.items()}, rounded
    )


@dataclass
class _Run:
    """The network quantized so far."""

    exact: nn.Module
    rounded: nn.Module
    specs: Mapping[str, QuantSpec]
    solutions: dict[str, Solution]
    biases: dict[str, Tensor]
    notes: dict[str, list[str]]

    def solve_free_(self, target: Target, why: str) -> None:
        matrix = target.layout.fold(target.weight.detach())
        self._put_(target, solve_free(matrix, self.specs[target.name], "mse"))
        self.notes.setdefault(target.name, []).append(f"data-free (mse): {why}")

    def solve_(self, target: Target, moments: Moments) -> None:
        matrix = target.layout.fold(target.weight.detach())
        before = self.solutions.get(target.name)
        bias = bias_of(self.rounded, target)
        if moments.hessian.dim() == 2:
            text = "inputs' second moments too large: their diagonal alone"
            self.notes.setdefault(target.name, []).append(text)
        if is_lookup(self.rounded, target):
            moments, bias = _with_lookup(moments, matrix), None
        found = solve(
            matrix,
            self.specs[target.name],
            moments,
            centred=bias is not None,
            start=None if before is None else (before.codes, before.grid),
        )
        self._put_(target, found)
        if bias is not None:
            self._correct_(target, bias, found, moments)

    def _put_(self, target: Target, found: Solution) -> None:
        self.solutions[target.name] = found
        matrix = dequantize_rows(found.codes, found.grid)
        weight = target.layout.unfold(matrix).to(target.weight.dtype).contiguous()
        self.hold_(target.name, weight)

    def hold_(self, name: str, value: Tensor) -> None:
        """Put a tensor wherever the network holds the one of that name."""
        hold_(self.exact, self.rounded, {name: nn.Parameter(value, requires_grad=False)})

    def _correct_(self, target: Target, bias: str, found: Solution, moments: Moments) -> None:
        """Give the bias what makes the mean output that of the float network."""
        path = target.name.removesuffix(target.attribute) + bias
        old = self.exact.get_parameter(path)
        values = dequantize_rows(found.codes, found.grid).reshape(moments.goal.shape)
        shift = moments.output - torch.einsum("grc,gc->gr", values, moments.mean)
        new = (old + shift.reshape(-1)).to(old.dtype).detach()
        self.biases[path] = new
        self.hold_(path, new)


def seen_uses(
    model: nn.Module, targets: Sequence[Target], batches: Sequence[Any], forward: Forward
) -> dict[str, Use]:
    """Return how the weights are used, from as few batches as it takes to meet them all."""
    seen: dict[str, Use] = {}
    missing = [t for t in targets if watches_of(model, t)[0]]
    for number, batch in enumerate(batches):
        try:
            found = uses(model, missing, batch, forward)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise RuntimeError(
                f"the model could not run on calibration batch {number} "
                f"({type(batch).__name__}): {type(error).__name__}: {error}. A dict is passed as keywords, "
                "a tuple as positional arguments, anything else as the one input."
            ) from error
        shifted = {k: replace(u, order=u.order + len(seen)) for k, u in found.items()}
        seen |= shifted
        missing = [t for t in missing if t.name not in seen]
        if not missing:
            break
    return seen


def _steps(own: Mapping[str, Target], seen: Mapping[str, Use]) -> Iterator[list[Target]]:
    """Yield the weights observed in one pass, in order of use: those that share an input together.

    Weights used more than once come again at the end.
    """
    order = sorted(seen, key=lambda name: seen[name].order)
    groups: list[list[Target]] = []
    for name in order:
        if groups and seen[groups[-1][0].name].inputs == seen[name].inputs:
            groups[-1].append(own[name])
        else:
            groups.append([own[name]])
    size = max(-(-len(groups) // MOST_PASSES), 1)
    merged = [list(chain(*groups[i : i + size])) for i in range(0, len(groups), size)]
    yield from merged
    for group in merged:
        again = [t for t in group if seen[t.name].calls > 1]
        if again:
            yield again


def _why_free(model: nn.Module, target: Target) -> str:
    reasons = watches_of(model, target)[1]
    return reasons[0] if reasons else "the calibration data never reach this layer"


def _with_lookup(moments: Moments, matrix: Tensor) -> Moments:
    """Return the moments of a weight that is also looked up: there its own error counts as much."""
    pull = (
        moments.hessian.diagonal(dim1=1, dim2=2).mean()
        if moments.hessian.dim() == 3
        else moments.hessian.mean()
    )
    weight = matrix.float()[None]
    eye = torch.eye(matrix.shape[1]) if moments.hessian.dim() == 3 else torch.ones(matrix.shape[1])
    return replace(
        moments,
        hessian=moments.hessian + pull * eye,
        goal=moments.goal + pull * weight,
        energy=moments.energy + pull * weight.square().sum(2),
    )
