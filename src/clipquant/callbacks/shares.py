"""One weight quantized apart from its model, by whichever process has it; the whole put together from such shares."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from clipquant.model import QuantizedModel
from clipquant.model.quantized import make_report, report_of
from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import LeftInFloat, QuantizedWeights
from clipquant.quant.methods import METHODS, Found, Method, Problem
from clipquant.quant.methods.base import reads_data
from clipquant.quant.network.layers import Selection, Target
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.report.record import LayerRecord

# Methods that look at one weight at a time where they look at no data, so that each may be coded by another process.
_APART = tuple(type(METHODS[name]) for name in ("rtn", "mse", "hqq", "auto"))


@dataclass(frozen=True)
class Share:
    """One weight as codes, and what the report says of it.

    Args:
        tensor: The codes.
        record: Its line in the report.
        note: What the reader should know of it.
        lookup: Whether it is looked up.
    """

    tensor: QuantizedTensor
    record: LayerRecord
    note: str
    lookup: bool


@dataclass(frozen=True)
class Left:
    """One weight that could not be coded: it stays as it is.

    Args:
        tensor: The float weight.
        why: The error.
    """

    tensor: Tensor
    why: str


@dataclass(frozen=True)
class Task:
    """How one weight is coded apart from its model.

    Args:
        name: Its key.
        layer: Its layer without tensors.
        attribute: Its name in the layer.
        recipe: The settings for it alone.
    """

    name: str
    layer: nn.Module
    attribute: str
    recipe: Recipe

    def share(self, weight: Tensor) -> Share:
        """Return the share of a weight, the same as where the whole model is quantized without data."""
        layer = _like(self.layer, {self.attribute: nn.Parameter(weight, requires_grad=False)})
        weights = quantize_weights(layer, self.recipe)
        record = make_report(weights, layer).layers[0]
        tensor = _on_host(weights.tensors[self.attribute])
        note = weights.notes.get(self.attribute, "")
        return Share(tensor, replace(record, name=self.name), note, bool(weights.lookups))

    def share_or_leave(self, weight: Tensor) -> Share | Left:
        """Return the share of a weight, rounded plainly where its method fails; itself where it has no codes at all."""
        plain = replace(self, recipe=replace(self.recipe, method="rtn"))
        first, why = self._tried(weight)
        second, _ = (first, why) if first is not None else plain._tried(weight)
        return Left(weight.cpu(), why) if second is None else second

    def _tried(self, weight: Tensor) -> tuple[Share | None, str]:
        try:
            return self.share(weight), ""
        except Exception as error:  # weights that are not finite, or whatever a method raises
            return None, f"{type(error).__name__}: {error}"


def task_of(target: Target, recipe: Recipe) -> Task:
    """Return how a weight is coded by itself, as a recipe for the whole model says.

    Args:
        target: The weight; its values are not read.
        recipe: The settings.
    """
    bits, own = recipe.override(target.name), target.attribute
    alone = replace(
        recipe,
        include=[glob.escape(own)],
        exclude=None,
        overrides=None if bits is None else {glob.escape(own): bits},
    )
    return Task(target.name, _like(target.module, {}), own, alone)


def codes_apart(method: Method) -> bool:
    """Return whether a method gives each weight codes by itself where it has no data.

    >>> codes_apart(METHODS["mse"]), codes_apart(METHODS["gptq"])
    (True, False)
    """
    return type(method) in _APART


@dataclass(frozen=True)
class Shared(Method):
    """A method whose work on some weights has been done already.

    Args:
        inner: The method, asked for the rest.
        known: Key -> the share of a weight that the method codes without data.
    """

    inner: Method
    known: Mapping[str, Share]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.inner.name

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        return self.inner.needs_data

    def reads_data(self, spec: Any) -> bool:
        """Return whether the method makes use of batches for a weight on such a grid."""
        return reads_data(self.inner, spec)

    def solve(self, problem: Problem) -> Found:
        """Return the codes that are known, and those of the method for weights that are left."""
        taken = [t for t in problem.targets if self._knows(t, problem)]
        codes: dict[str, Coded] = {t.name: self.known[t.name].tensor.coded for t in taken}
        methods = {name: self.known[name].tensor.method for name in codes}
        found = Found(codes, methods)
        rest = problem.given(found)
        return found if not rest.targets else found.joined(self.inner.solve(rest))

    def _knows(self, target: Target, problem: Problem) -> bool:
        blind = not problem.calibration or not self.reads_data(problem.specs[target.name])
        return target.name in self.known and blind


def wanted(recipe: Recipe, targets: Sequence[Target], with_data: bool) -> list[Target]:
    """Return the weights that processes can code apart from each other.

    Args:
        recipe: How the model is quantized.
        targets: Its weights; their values are not read.
        with_data: Whether there are batches.
    """
    if not codes_apart(recipe.solver):
        return []
    reads = {t.name: reads_data(recipe.solver, recipe.asked(t)) for t in targets}
    return [t for t in targets if not (with_data and reads[t.name])]


def assembled(
    selection: Selection,
    shares: Mapping[str, Share | Left],
    floats: Mapping[str, Tensor],
    float_bytes: int,
) -> QuantizedModel:
    """Return a quantized model from shares: the one that a process with the whole model would have made.

    Args:
        selection: Which weights of it are quantized.
        shares: Key of every such weight -> its share.
        floats: Every other tensor, in the order of the state dict.
        float_bytes: Of the whole model.
    """
    coded = {t.name: s for t in selection.targets if isinstance(s := shares[t.name], Share)}
    failed = {name: share for name, share in shares.items() if isinstance(share, Left)}
    why = {name: f"could not be quantized: {left.why}" for name, left in failed.items()}
    left = (
        *selection.left,
        *(LeftInFloat(name, failed[name].tensor.nbytes, said) for name, said in why.items()),
    )
    weights = QuantizedWeights(
        {name: share.tensor for name, share in coded.items()},
        {**floats, **{name: item.tensor for name, item in failed.items()}},
        selection.aliases,
        left,
        {name: share.note for name, share in coded.items() if share.note},
        frozenset(name for name, share in coded.items() if share.lookup),
    )
    records = tuple(share.record for share in coded.values())
    return QuantizedModel(weights, report_of(weights, records, float_bytes))


def _like(layer: nn.Module, parameters: dict[str, nn.Parameter]) -> nn.Module:
    """Return a layer of the same class and attributes that holds these parameters alone."""
    made: nn.Module = object.__new__(type(layer))
    own = {k: v for k, v in vars(layer).items() if not k.endswith("_hooks")}
    vars(made).update(vars(nn.Module()))
    vars(made).update(own)
    vars(made).update(_parameters=dict(parameters), _buffers={}, _modules={})
    return made


def _on_host(tensor: QuantizedTensor) -> QuantizedTensor:
    grid = tensor.grid
    levels = grid.levels if isinstance(grid.levels, int) else grid.levels.cpu()
    zero = None if grid.zero is None else grid.zero.cpu()
    moved = replace(grid, scale=grid.scale.cpu(), zero=zero, levels=levels)
    bits = tensor.bits if isinstance(tensor.bits, int) else tensor.bits.cpu()
    return replace(tensor, coded=Coded(tensor.codes.cpu(), moved), bits=bits)
