"""What a method is: all that it may read stands in the problem, all that it decides in what it returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.devices import moved, with_room
from clipquant.quant.network.layers import Target, check_finite
from clipquant.quant.network.outputs import distances
from clipquant.quant.network.twin import Twin


@dataclass(frozen=True)
class Problem:
    """What is asked of a method: codes for some weights of a model.

    Args:
        model: In eval mode. A method may run it, with other weights in a `Twin`; it is not changed.
        targets: The weights to quantize, in the order of the state dict.
        specs: Name of a weight -> its grid.
        calibration: Batches and how to run them; None: the weights are all there is to see.
        fixed: Name of a weight that is quantized already -> its codes; none of the targets.
    """

    model: nn.Module
    targets: Sequence[Target]
    specs: Mapping[str, QuantSpec]
    calibration: Calibration | None = None
    fixed: Mapping[str, tuple[Target, Coded]] = field(default_factory=dict)

    @property
    def data(self) -> Calibration:
        """The calibration, of a problem that has one."""
        if self.calibration is None:
            raise ValueError("this method calibrates on data, and the problem has none.")
        return self.calibration

    def only(self, targets: Sequence[Target]) -> Problem:
        """Return the problem of some of its targets."""
        return replace(self, targets=tuple(targets))

    def given(self, found: Found) -> Problem:
        """Return the problem that is left when some targets have their codes."""
        solved = {t.name: (t, found.codes[t.name]) for t in self.targets if t.name in found.codes}
        rest = tuple(target for target in self.targets if target.name not in solved)
        return replace(self, targets=rest, fixed={**self.fixed, **solved})

    def twin(self, found: Found | None = None) -> Twin:
        """Return the model as it runs with the weights that are fixed, and those and the biases of `found`."""
        twin = Twin(self.model)
        for target, coded in self.fixed.values():
            twin.hold_({target.name: weight_of(target, coded)})
        if found is not None:
            by_name = {target.name: target for target in self.targets}
            for name, coded in found.codes.items():
                twin.hold_({name: weight_of(by_name[name], coded)})
            twin.hold_(found.biases)
        return twin


@dataclass(frozen=True)
class Found:
    """What a method decided.

    Args:
        codes: Name of a weight -> its codes.
        methods: Name of a weight -> what chose its codes, where it was not the method itself.
        biases: State-dict key of a bias -> its new value.
        notes: Name of a weight -> what the reader of the report should know, such as a fallback.
    """

    codes: Mapping[str, Coded]
    methods: Mapping[str, str] = field(default_factory=dict)
    biases: Mapping[str, Tensor] = field(default_factory=dict)
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def joined(self, other: Found) -> Found:
        """Return both, of which no weight is in both."""
        pairs = ((getattr(self, key), getattr(other, key)) for key in vars(self))
        return Found(*({**mine, **theirs} for mine, theirs in pairs))

    def noted(self, names: Sequence[str], note: str) -> Found:
        """Return the same with one more remark on some weights."""
        added = {name: (*self.notes.get(name, ()), note) for name in names}
        return replace(self, notes={**self.notes, **added})


class Method(ABC):
    """What chooses codes: a frozen dataclass of knobs with a name, `needs_data`, and `solve`.

    A method of your own needs no base class: an object with the three counts as one. Two more are
    optional: `summary`, a line for lists of methods, and `reads_data(spec)`, whether batches are
    wanted for a weight on such a grid though it could be solved without.
    """

    name: ClassVar[str]
    needs_data: ClassVar[bool]

    @classmethod
    def __subclasshook__(cls, other: type) -> Any:  # a bool or NotImplemented
        if cls is Method and callable(getattr(other, "solve", None)):
            return all(hasattr(other, key) for key in ("name", "needs_data")) or NotImplemented
        return NotImplemented

    @abstractmethod
    def solve(self, problem: Problem) -> Found:
        """Return codes for every target of the problem, on the grids asked for."""
        ...


def reads_data(method: Method, spec: QuantSpec) -> bool:
    """Return whether a method makes use of batches for a weight on such a grid."""
    asked = getattr(method, "reads_data", None)
    return bool(method.needs_data if asked is None else asked(spec))


def solved(method: Method, problem: Problem) -> Found:
    """Return what a method finds, each weight with the name of what chose its codes."""
    found = method.solve(problem)
    return replace(found, methods=dict.fromkeys(found.codes, method.name) | dict(found.methods))


def nearest(problem: Problem, *candidates: Found) -> Found:
    """Return the solution whose network's outputs are nearest to the float network's, the first if equal.

    Layer by layer GPTQ is the best known, but a layer that is run many times, feeding itself, can
    end up further from the float network than with plain ranges.

    Args:
        problem: The last target's layer stands for the output where there is no other.
        candidates: Solutions to choose from.
    """
    last = problem.targets[-1].name.rpartition(".")[0]
    twins = [problem.twin(found) for found in candidates]
    apart = distances(Twin(problem.model), twins, problem.data, last)
    return candidates[apart.index(min(apart))]


def by_weight(code: Callable[[Tensor, QuantSpec], Coded]) -> Callable[[Problem], Found]:
    """Return a solver that gives each weight the codes of a function of its matrix.

    Args:
        code: From a (rows, columns) matrix and the grid asked for to codes.

    Raises:
        ValueError: From the solver, for weights that are not finite.
    """

    def solve(problem: Problem) -> Found:
        codes: dict[str, Coded] = {}
        notes: dict[str, tuple[str, ...]] = {}
        for target in problem.targets:
            matrix, spec = matrix_of(target), problem.specs[target.name]
            codes[target.name], said = with_room(partial(_on, code, matrix, spec), matrix.device)
            if said:
                notes[target.name] = (said,)
        if not all(bool(coded.grid.scale.isfinite().all()) for coded in codes.values()):
            check_finite(problem.targets)  # a weight that is not finite leaves no finite step
        return Found(codes, notes=notes)

    return solve


def _on(
    code: Callable[[Tensor, QuantSpec], Coded],
    matrix: Tensor,
    spec: QuantSpec,
    where: torch.device | None,
) -> Coded:
    """Return a matrix's codes, computed somewhere else."""
    coded = code(matrix if where is None else matrix.to(where), spec)
    return coded if where is None else moved(coded, matrix.device)


def matrix_of(target: Target) -> Tensor:
    """Return a weight as the (rows, columns) matrix that is quantized."""
    return target.layout.fold(target.weight.detach())


def weight_of(target: Target, coded: Coded) -> Tensor:
    """Return the weight that codes stand for, in the shape and dtype of the target."""
    return target.layout.unfold(coded.values()).to(target.weight.dtype).contiguous()
