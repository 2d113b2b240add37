"""How a model is quantized: which of its weights, on which grids, by which method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from clipquant.errors import ArgumentError
from clipquant.quant.codes.granularity import SHORT, SHORT_LOOKUP, fitting_granularity
from clipquant.quant.codes.size import coded_bytes
from clipquant.quant.codes.spec import Granularity, QuantSpec, check_bits
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.methods import METHODS, Method
from clipquant.quant.methods.base import reads_data
from clipquant.quant.network.batchnorm import batch_norms
from clipquant.quant.network.layers import LOOKUPS, Globs, Selection, Target, check_globs, select


@dataclass(frozen=True)
class Recipe:
    """The settings of quantizing, checked when they are written down.

    Args:
        bits: Width of a code, 1 to 8.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel. None: a
            channel where that holds, else the group that pays; see `fitting_granularity`.
        method: A name in `METHODS`, or an object with `name`, `needs_data` and `solve`.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.
        trained: State-dict key -> the grid that training has left; such a weight is put on it, whatever else
            is said.

    Raises:
        ValueError: For a setting that cannot be; the message names the rule, the value and the remedy.

    >>> Recipe(bits=4, method="gptq").needs_data
    True
    """

    bits: int = 8
    levels: int | None = None
    symmetric: bool | None = None
    granularity: Granularity | None = None
    method: str | Method = "auto"
    include: Globs = None
    exclude: Globs = None
    overrides: Mapping[str, int] | None = None
    trained: Mapping[str, TrainedGrid] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.spec
        check_method(self.method)
        if self.symmetric not in (True, False, None):
            raise ArgumentError(
                f"symmetric must be true, false or None, what suits the width; got {self.symmetric!r}."
            )
        check_lists(include=self.include, exclude=self.exclude)
        _check_overrides(self.overrides)

    @property
    def spec(self) -> QuantSpec:
        """The grid of every weight that has no bits of its own."""
        shared = "channel" if self.granularity is None else self.granularity
        return QuantSpec(self.bits, self.levels, self.symmetric, shared)

    @property
    def solver(self) -> Method:
        """The method, as an object."""
        return METHODS[self.method] if isinstance(self.method, str) else self.method

    @property
    def needs_data(self) -> bool:
        return bool(self.solver.needs_data)

    def select(self, model: nn.Module) -> Selection:
        """Return which weights of a model are quantized, and why others are not.

        A weight that would take more bytes as codes stays in float, unless an override gives it bits, or
        that is so of all.
        """
        selection = select(model, self.include, self.exclude)
        specs = {target.name: self.asked(target) for target in selection.targets}
        larger = {
            target.name: f"would take more bytes as codes: {size:,} against {target.weight.nbytes:,}"
            for target in selection.targets
            if self.override(target.name) is None
            and (size := coded_bytes(target.layout, specs[target.name])) > target.weight.nbytes
        }
        return selection.without(larger) if len(larger) < len(specs) else selection

    def specs(self, targets: Iterable[Target]) -> dict[str, QuantSpec]:
        """Return each weight's grid: `spec`, with the bits of the first override that matches.

        Raises:
            ValueError: For a glob of `overrides` that matches none of the weights.
        """
        targets = list(targets)
        self.check_overrides(targets)
        return {target.name: self._spec_of(target) for target in targets}

    def check_overrides(self, targets: Iterable[Target]) -> None:
        """Raise for a glob of `overrides` that matches none of the weights; their values are not read."""
        check_globs([target.name for target in targets], overrides=self.overrides)

    def asked(self, target: Target) -> QuantSpec:
        """Return a weight's grid, a scale a channel where nothing else is said."""
        bits = self.override(target.name)
        return self.spec if bits is None else _with_bits(self.spec, bits)

    def _spec_of(self, target: Target) -> QuantSpec:
        spec = self.asked(target)
        if self.granularity is not None:
            return spec
        matrix = target.layout.fold(target.weight.detach())
        short = SHORT_LOOKUP if isinstance(target.module, LOOKUPS) else SHORT
        return replace(spec, granularity=fitting_granularity(matrix, spec, short))

    def override(self, name: str) -> int | None:
        """Return the bits that a weight is given of its own."""
        matching = (b for glob, b in (self.overrides or {}).items() if fnmatchcase(name, glob))
        return next(matching, None)

    def reads_data(self, model: nn.Module) -> bool:
        """Return whether batches make a difference: to a weight's method, or to BatchNorm statistics."""
        targets = self.select(model).targets
        self.check_overrides(targets)
        # No value of a weight is looked at.
        left = [self.asked(target) for target in targets if target.name not in self.trained]
        follows = bool(batch_norms(model)) and not self.trained
        return follows or any(reads_data(self.solver, spec) for spec in left)

    def without_data(self) -> Recipe:
        """Return the same settings with the best method that looks at the weights alone."""
        return replace(self, method="auto") if self.needs_data else self


def check_method(method: Any) -> None:
    """Raise unless `method` is a known name or an object that is a method.

    >>> check_method("awq")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: method must be one of 'auto', 'rtn', 'mse', 'hqq', 'gptq', 'adaround', \
'distill', or an object with name, \
needs_data and solve(problem); got 'awq'.
    """
    known = method in METHODS if isinstance(method, str) else isinstance(method, Method)
    if not known or isinstance(method, type):
        raise ArgumentError(
            f"method must be one of {', '.join(map(repr, METHODS))}, or an object with name, needs_data "
            f"and solve(problem); got {method!r}."
        )


def check_lists(**globs: Any) -> None:
    """Raise for a text where a list of globs is meant, whose letters would be globs of their own.

    >>> check_lists(include="fc*")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: include must be a list of globs over the names of weights; got 'fc*'. Write ['fc*'].
    """
    for name, given in globs.items():
        if isinstance(given, str) or (given is not None and not isinstance(given, Iterable)):
            remedy = f" Write [{given!r}]." if isinstance(given, str) else ""
            raise ArgumentError(
                f"{name} must be a list of globs over the names of weights; got {given!r}.{remedy}"
            )


def _check_overrides(overrides: Any) -> None:
    if not isinstance(overrides, Mapping | None):
        raise ArgumentError(
            f"overrides must give bits for globs over the names of weights; got {overrides!r}. "
            'Write a dict such as {"fc2.*": 8}.'
        )
    for glob, bits in (overrides or {}).items():
        _check_override(glob, bits)


def _check_override(glob: object, bits: Any) -> None:
    try:
        check_bits(bits)
    except ArgumentError as error:
        raise ArgumentError(f"overrides[{glob!r}]: {error}") from None


def data_free() -> str:
    """Return the names of the methods that need no data, for messages."""
    names = [repr(n) for n, method in METHODS.items() if not method.needs_data and n != "auto"]
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _with_bits(spec: QuantSpec, bits: int) -> QuantSpec:
    if spec.bits == bits:
        return spec
    return QuantSpec(bits, None, spec.symmetric if bits > 1 else False, spec.granularity)
