"""Layer after layer: each weight's codes from its inputs in the network quantized so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.codes.ranges import mse_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.base import Found, Problem, matrix_of, weight_of
from clipquant.quant.network.devices import moved, with_room
from clipquant.quant.network.layers import Target, bias_of, check_finite, is_lookup
from clipquant.quant.network.moments import Moments, observe
from clipquant.quant.network.replay import Replay, parts_of
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.watches import Use, uses, watches_of

MOST_PASSES = 24  # passes over the calibration data; deeper networks observe several layers in one


@dataclass(frozen=True)
class Layer:
    """One weight, and what is known of its inputs.

    Args:
        matrix: Floating (rows, columns).
        spec: The grid asked for.
        moments: Of its inputs in the network quantized so far, against the float network's outputs.
        centred: Leave the mean error out, since a bias will take it up.
        start: Codes found before, as another candidate.
    """

    matrix: Tensor
    spec: QuantSpec
    moments: Moments
    centred: bool
    start: Coded | None = None


LayerCode: TypeAlias = Callable[
    [Layer], tuple[Coded, str]
]  # codes, and the name of what chose them


def layer_by_layer(code: LayerCode) -> Callable[[Problem], Found]:
    """Return a solver that gives each weight codes by its inputs from the weights quantized before it.

    Each weight is asked for the float network's outputs on the quantized network's inputs, so errors are
    made up for down the network; its bias takes up what is left of the mean. A weight that is used several
    times in one pass (a shared layer) changes its own inputs and is therefore solved a second time. One
    whose inputs are not known is rounded to nearest on the range of least squared error, and noted.

    Args:
        code: From a layer to its codes.

    Raises:
        ValueError: From the solver, if a layer's inputs are NaN or infinite.
        RuntimeError: From the solver, if the forward pass raises, naming the batch.

    Source:
        Inputs of the quantized prefix against outputs of the float network: GPTAQ, arXiv 2504.02692.
    """

    def solve(problem: Problem) -> Found:
        check_finite(problem.targets)
        return _Run(problem, code).solve()

    return solve


class _Run:
    """One pass down the network: what has been quantized of it so far."""

    def __init__(self, problem: Problem, code: LayerCode) -> None:
        self.problem, self.code = problem, code
        self.exact, self.rounded = Twin(problem.model), problem.twin()
        self.codes: dict[str, Coded] = {}
        self.methods: dict[str, str] = {}
        self.biases: dict[str, Tensor] = {}
        self.notes: dict[str, tuple[str, ...]] = {}
        self.alone: set[str] = set()

    def solve(self) -> Found:
        problem, calibration = self.problem, self.problem.data
        own = {t.name: t for t in problem.targets}
        seen = uses(problem.targets, problem.model, calibration)
        for name, target in own.items():
            if name not in seen:
                self._solve_free_(target, _why_free(problem.model, target))
        steps, again = _steps(own, seen)
        names = [[target.name for target in group] for group in steps]
        replay = parts_of(problem.model, calibration, names)
        if not replay.parts:
            steps = self._merged(steps)
        replay.settle_([name for name in own if name not in seen])
        whole = len(steps) + len(again)
        for number, group in enumerate([*steps, *again]):
            calibration.tell(group[0].name, number, whole)
            if number == len(steps):  # from here on weights change that others have been fitted to
                replay.off_()
            moments = self._observed(group, replay)
            for target in group:
                self._solve_(target, moments[target.name])
            replay.settle_([target.name for target in group])
        return Found(self.codes, self.methods, self.biases, self.notes)

    def _merged(self, steps: list[list[Target]]) -> list[list[Target]]:
        """Return the steps with neighbours in one pass, of which the first alone makes up for what came before.

        All of them meet the same errors; made up for by each, they would be made up for several times.
        """
        merged = _merged(steps)
        heads = {target.name for step in steps[:: _at_once(steps)] for target in step}
        self.alone = {target.name for step in merged for target in step} - heads
        return merged

    def _observed(self, group: list[Target], replay: Replay) -> dict[str, Moments]:
        """Return the moments of some weights; what goes wrong in a replay is done again without."""
        twins = self.exact, self.rounded
        observed = partial(
            observe, twins, group, self.problem.data, hold_apart=True, few=True, alone=self.alone
        )
        if replay.parts:
            try:
                return observed(replay=replay)
            except Exception:  # whatever user code makes of zeros
                replay.off_()
        found, said = with_room(lambda where: observed(sums_on=where), group[0].weight.device)
        for target in group if said else ():
            self._note_(target, said)
        return found

    def _solve_free_(self, target: Target, why: str) -> None:
        matrix = matrix_of(target)
        coded = Coded.nearest(matrix, mse_grid(matrix, self.problem.specs[target.name]))
        self._put_(target, coded, "mse")
        self._note_(target, f"data-free (mse): {why}")

    def _solve_(self, target: Target, moments: Moments) -> None:
        model, matrix = self.problem.model, matrix_of(target)
        bias = bias_of(model, target)
        if moments.hessian.dim() == 2 and moments.inputs is None:
            self._note_(target, "inputs' second moments too large: their diagonal alone")
        if is_lookup(model, target):
            moments, bias = _with_lookup(moments, matrix), None
        spec, start = self.problem.specs[target.name], self.codes.get(target.name)
        layer = moved(Layer(matrix, spec, moments, bias is not None, start), moments.goal.device)

        def compute(where: torch.device | None) -> tuple[Coded, str]:
            coded, method = self.code(layer if where is None else moved(layer, where))
            return moved(coded, matrix.device), method

        (coded, method), said = with_room(compute, matrix.device)
        if said:
            self._note_(target, said)
        self._put_(target, coded, method)
        if bias is not None:
            self._correct_(target, bias, coded, moments)

    def _put_(self, target: Target, coded: Coded, method: str) -> None:
        self.codes[target.name], self.methods[target.name] = coded, method
        self.rounded.hold_({target.name: weight_of(target, coded)})

    def _note_(self, target: Target, note: str) -> None:
        self.notes[target.name] = (*self.notes.get(target.name, ()), note)

    def _correct_(self, target: Target, bias: str, coded: Coded, moments: Moments) -> None:
        """Give the bias what makes the mean output that of the float network."""
        path = target.name.removesuffix(target.attribute) + bias
        old = parameter_at(self.problem.model, path)
        values = coded.values().reshape(moments.goal.shape)
        mean, output = (part.to(values.device) for part in moments.means())
        shift = output - torch.einsum("grc,gc->gr", values, mean)
        self.biases[path] = (old + shift.reshape(-1)).to(old.dtype).detach()
        self.rounded.hold_({path: self.biases[path]})


def _steps(
    own: Mapping[str, Target], seen: Mapping[str, Use]
) -> tuple[list[list[Target]], list[list[Target]]]:
    """Return the weights solved after one pass each, in order of use, and those that are solved again.

    Weights that share an input are solved together, and those used more than once come again.
    """
    order = sorted(seen, key=lambda name: seen[name].order)
    groups: list[list[Target]] = []
    for name in order:
        if groups and seen[groups[-1][0].name].inputs == seen[name].inputs:
            groups[-1].append(own[name])
        else:
            groups.append([own[name]])
    again = [[t for t in group if seen[t.name].calls > 1] for group in _merged(groups)]
    return groups, [group for group in again if group]


def _merged(groups: list[list[Target]]) -> list[list[Target]]:
    """Return the groups with so many neighbours together that all take no more than `MOST_PASSES`."""
    size = _at_once(groups)
    return [list(chain(*groups[i : i + size])) for i in range(0, len(groups), size)]


def _at_once(groups: list[list[Target]]) -> int:
    return max(-(-len(groups) // MOST_PASSES), 1)


def _why_free(model: nn.Module, target: Target) -> str:
    reasons = watches_of(model, target)[1]
    return reasons[0] if reasons else "the calibration data never reach this layer"


def _with_lookup(moments: Moments, matrix: Tensor) -> Moments:
    """Return the moments of a weight that is also looked up: there its own error counts as much."""
    hessian, weight = moments.hessian, matrix.float()[None]
    full = hessian.dim() == 3
    pull = (hessian.diagonal(dim1=1, dim2=2) if full else hessian).mean()
    ones = torch.ones_like(hessian[0, 0] if full else hessian[0])
    return replace(
        moments,
        hessian=hessian + pull * (ones.diag() if full else ones),
        goal=moments.goal + pull * weight,
        energy=moments.energy + pull * weight.square().sum(2),
        apart=None if moments.apart is None else _with_lookup(moments.apart, matrix),
    )
