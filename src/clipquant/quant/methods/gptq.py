"""GPTQ: codes that keep a layer's outputs, on the range that serves them best; never worse than plain rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import mse_grid, plain_rounding, shrunk_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.descent import SWEEPS, refine
from clipquant.quant.error.output_error import DAMPING, OutputError, best_of, varying
from clipquant.quant.error.walk import Walk, plan_walk, walk_all
from clipquant.quant.methods.base import Found, Method, Problem
from clipquant.quant.methods.layerwise import Layer, layer_by_layer
from clipquant.quant.network.moments import Moments


@dataclass(frozen=True)
class Gptq(Method):
    """Keep the outputs of the float network on the quantized one's inputs, layer after layer.

    Args:
        damping: Pull towards the float weights, as a share of H's mean diagonal.
        drawn_in: Width -> shares of the min-max range that are tried: the fewer codes, the smaller.
        fine: The shares tried at all other widths.
        sweeps: Most rounds of descent on codes and scales after the walk.

    Source:
        Frantar et al. 2022, arXiv 2210.17323; Behdin et al. 2023, arXiv 2309.01885 (descent); inputs
        of the quantized prefix against outputs of the float network: GPTAQ, arXiv 2504.02692.
    """

    damping: float = DAMPING
    drawn_in: Mapping[int, tuple[float, ...]] = field(
        default_factory=lambda: {
            1: (0.9, 0.7, 0.6, 0.5, 0.4, 0.3),
            2: (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4),
            3: (1.0, 0.9, 0.8, 0.7, 0.6),
        }
    )
    fine: tuple[float, ...] = (1.0, 0.95, 0.9, 0.8)
    sweeps: int = SWEEPS
    name: ClassVar[str] = "gptq"
    needs_data: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "layer after layer, keeps the outputs of the float network on the quantized one's inputs"
    )

    def solve(self, problem: Problem) -> Found:
        return layer_by_layer(self.code)(problem)

    def code(self, layer: Layer) -> tuple[Coded, str]:
        """Return a layer's codes, and what chose them: "rtn" where nothing did better."""
        moments, spec = layer.moments, layer.spec
        groups = moments.hessian.shape[0]
        if moments.hessian.dim() == 2 and moments.inputs is None:
            return diagonal_codes(layer.matrix, spec, moments)
        if spec.granularity == "tensor" and groups > 1:
            return Coded.nearest(layer.matrix, mse_grid(layer.matrix, spec)), "mse"
        parts = layer.matrix.float().chunk(groups)
        starts = [None] * groups if layer.start is None else layer.start.split(groups)
        solved = [
            self._group(part, spec, _Rows.of(moments, g, layer.centred), start)
            for g, (part, start) in enumerate(zip(parts, starts, strict=True))
        ]
        plain = all(rounded for _, rounded in solved)
        return Coded.stack([coded for coded, _ in solved]), "rtn" if plain else self.name

    def _group(
        self, matrix: Tensor, spec: QuantSpec, rows: _Rows, start: Coded | None
    ) -> tuple[Coded, bool]:
        """Return codes of rows that share their inputs, and whether all are plain rounding's."""
        damped = rows.shown.shrunk(matrix, rows.noise).damped(matrix, self.damping)
        walk = plan_walk(damped)
        if rows.apart is not None:
            best = walk.weights
            wanted = worthwhile(matrix, best, rows.apart)
            walk, damped = walk.towards(wanted), damped.towards(wanted, best)
        weight = rows.shown.diagonal()
        first, _ = best_of(damped, self._walks(matrix, spec, walk, weight, start))
        return rows.best(matrix, spec, refine(damped, first, self.sweeps))

    def _walks(
        self, matrix: Tensor, spec: QuantSpec, walk: Walk, weight: Tensor, start: Coded | None
    ) -> Iterator[Coded]:
        """Yield the codes on every range that is tried."""
        shares = self.drawn_in.get(spec.width, self.fine)
        grids = [shrunk_grid(matrix, spec, share) for share in shares]
        if isinstance(spec.granularity, int):
            grids.append(mse_grid(matrix, spec, weight))
        if start is not None:
            yield start
            grids.append(start.grid)
        yield from walk_all(walk, grids)


@dataclass(frozen=True)
class _Rows:
    """What is known of the output error of rows that share their inputs.

    Args:
        shown: On the inputs that codes are fitted to.
        apart: On inputs held apart, where there are any.
        noise: Share of H that is chance: by how its pieces differ, and by columns against samples.
    """

    shown: OutputError
    apart: OutputError | None
    noise: float

    @classmethod
    def of(cls, moments: Moments, group: int, centred: bool) -> _Rows:
        apart = moments.apart
        held = None if apart is None else output_error_of(apart, group, centred)
        columns = moments.hessian.shape[-1]
        few = columns / (columns + moments.count)
        return cls(output_error_of(moments, group, centred), held, max(moments.noise, few))

    def best(self, matrix: Tensor, spec: QuantSpec, fitted: Coded) -> tuple[Coded, bool]:
        """Return the codes fitted, but for rows that the weights' own range or plain rounding serve better.

        No row is worse than plain rounding on what it was shown.
        """
        rtn = plain_rounding(matrix, spec)
        judge = self.shown if self.apart is None else self.apart
        bound = self.shown.of(rtn)
        best, least, plain = rtn, judge.of(rtn), torch.ones_like(bound, dtype=torch.bool)
        for coded in (Coded.nearest(matrix, mse_grid(matrix, spec)), fitted):
            error = judge.of(coded)
            better = coded.takes((error < least) & (self.shown.of(coded) <= bound))
            best, least = coded.where(better, best), torch.where(better, error, least)
            plain &= ~better
        return best, bool(plain.all())


def worthwhile(matrix: Tensor, wanted: Tensor, apart: OutputError) -> Tensor:
    """Return float weights as far from the given ones as inputs held apart show to be of use.

    What was fitted to few inputs makes up for errors that others do not have, or that belong to other
    inputs altogether, as where a decoder reads what it has put out.

    Args:
        matrix: (rows, columns): the float weights.
        wanted: (rows, columns): those that were fitted.
        apart: Output error on inputs that these were not fitted to.

    Returns:
        The weights of least error on the line between both.

    >>> error = OutputError(torch.eye(1), torch.tensor([[1.2]]), torch.tensor([1.44]))
    >>> worthwhile(torch.tensor([[1.0]]), torch.tensor([[1.4]]), error)
    tensor([[1.2000]])
    """
    change = wanted - matrix
    curve = (apart.product(change) * change).sum()
    fall = (apart.slope(matrix) * change).sum()
    share = torch.where(curve > 0, -fall / curve, 0.0).clamp(0, 1)
    return matrix + share * change


def diagonal_codes(matrix: Tensor, spec: QuantSpec, moments: Moments) -> tuple[Coded, str]:
    """Return nearest codes on the range of least error, each weight counted by its input's E[x^2]."""
    rows = matrix.shape[0] // moments.hessian.shape[0]
    weight = moments.hessian.repeat_interleave(rows, 0)
    drawn, rtn = (
        Coded.nearest(matrix, mse_grid(matrix.float(), spec, weight)),
        plain_rounding(matrix, spec),
    )
    energy = float((matrix.square() * weight).sum()) or 1.0
    errors = [
        float(((coded.values() - matrix).square() * weight).sum()) / energy
        for coded in (drawn, rtn)
    ]
    return (rtn, "rtn") if errors[0] > errors[1] else (drawn, "mse")


def output_error_of(moments: Moments, group: int, centred: bool) -> OutputError:
    """Return the output error of a group of rows, its mean left out if a bias takes that up."""
    hessian, goal, energy = moments.hessian[group], moments.goal[group], moments.energy[group]
    inputs = None if moments.inputs is None else moments.inputs[group]
    if not centred:
        return OutputError(hessian, goal, energy, inputs)
    mean, output = moments.mean[group], moments.output[group]
    goal, energy = goal - torch.outer(output, mean), energy - output.square()
    if inputs is not None:
        moving = varying(inputs.square().sum(0), mean)
        inputs = (inputs - mean / math.sqrt(moments.count)) * moving
        return OutputError(hessian, goal * moving, energy, inputs)
    moving = varying(hessian.diagonal(), mean)
    hessian = (hessian - torch.outer(mean, mean)) * torch.outer(moving, moving)
    return OutputError(hessian, goal * moving, energy)
