"""Weights with bits of their own for every row: each at every width, and the allocation between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import Coded, Grid, row_levels
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import QuantizedWeights, rest_of
from clipquant.quant.codes.zeros import is_pruned, kept_zeros
from clipquant.quant.network.batchnorm import reestimate
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import Selection, Target, bias_of, is_lookup, lookups_of
from clipquant.quant.network.moments import HESSIAN_LIMIT, Moments, observe
from clipquant.quant.network.twin import Twin
from clipquant.quant.widths.frontier import WIDTHS, Choices, Frontier, frontier
from clipquant.quant.widths.nearest import nearest_rows
from clipquant.quant.widths.rate import CHOICES, RateTable, rated_apart, rated_rows
from clipquant.quant.widths.rows import RowGptq, solve_rows
from clipquant.quant.widths.sensitivity import with_unseen
from clipquant.quant.widths.table import RowTable

ROWS = RowGptq()  # how rows are walked


@dataclass(frozen=True)
class Allocator:
    """A model's weights at every width, and what each row loses at each.

    Args:
        model: The float model.
        selection: What of it is quantized.
        tables: Name of a weight -> its codes and grids at 0 to 8 bits.
        biases: Name of a weight -> name of the bias that takes up its mean error.
        frontier: The best allocations.
        notes: Name of a weight -> what its reader should know.
        calibration: Batches, and how to run them; None: no batch was seen.
    """

    model: nn.Module
    selection: Selection
    tables: Mapping[str, RowTable | RateTable]
    biases: Mapping[str, str]
    frontier: Frontier
    notes: Mapping[str, str]
    calibration: Calibration | None = None

    def weights(self, bits: Mapping[str, Tensor]) -> QuantizedWeights:
        """Return the weights with these widths, uint8 (rows,) a weight."""
        tensors = {}
        for target in self.selection.targets:
            table, own = self.tables[target.name], bits[target.name]
            coded = table.take(own)
            if is_pruned(target.weight):
                coded = kept_zeros(coded, target.layout.fold(target.weight.detach()).float().cpu())
            tensors[target.name] = QuantizedTensor(
                coded, table.widths(own), target.layout, target.weight.dtype, table.method
            )
        floats = rest_of(self.model, tensors, self.selection.aliases)
        for name, bias in self.biases.items():
            shift = self.tables[name].shift(bits[name])
            if shift is not None:
                floats[bias] = (floats[bias] + shift).to(floats[bias].dtype)
        left, aliases = self.selection.left, self.selection.aliases
        lookups = lookups_of(self.model, self.selection.targets)
        return QuantizedWeights(tensors, floats, aliases, left, self.notes, lookups)

    def settled(self, weights: QuantizedWeights) -> QuantizedWeights:
        """Return the same weights, with BatchNorm statistics that follow them where that is better."""
        if not self.calibration:
            return weights
        rounded = Twin(self.model)
        rounded.hold_({name: dequantize(tensor) for name, tensor in weights.tensors.items()})
        rounded.hold_({name: weights.floats[name] for name in self.biases.values()})
        return weights.following(reestimate(Twin(self.model), rounded, self.calibration))

    def uniform(self, width: int) -> dict[str, Tensor]:
        """Return one width for all rows, but for weights whose width is given."""
        return {
            name: torch.full(
                (len(choice.losses),),
                width if width in choice.widths else choice.widths[0],
                dtype=torch.uint8,
            )
            for name, choice in self.frontier.choices.items()
        }

    def sensitivities(self, bits: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the expected increase of the loss by each weight's rounding."""
        return {
            name: float(choice.losses.gather(1, bits[name].long()[:, None]).sum())
            for name, choice in self.frontier.choices.items()
        }


def allocator(
    model: nn.Module,
    selection: Selection,
    fisher: Mapping[str, Tensor],
    calibration: Calibration | None,
    *,
    group_size: int | None = None,
    fixed: Mapping[str, int] | None = None,
    coded: bool = False,
) -> Allocator:
    """Return every weight at every width, and the frontier of their allocations.

    Codes are GPTQ's on the inputs that the weights meet in the float network, so that a row's code at
    a width depends on no other row and every allocation is at hand. A weight whose inputs are not
    seen, or not in full, is rounded to nearest and noted; one that the loss never meets has 8 bits.

    Args:
        model: The float model; it is not touched.
        selection: What of it is quantized.
        fisher: Name of a weight -> E[g^2], (rows, columns).
        calibration: Batches, and how to run them; none: every weight is rounded to nearest.
        group_size: Weights of a row that share a scale. None: the whole row.
        fixed: Name of a weight -> its width, where it is given.
        coded: Whether codes will stand in an entropy code: then rows are weighed by the bytes that they take
            there, and their codes chosen by error and bytes together.

    Raises:
        ValueError: If a weight's inputs are NaN or infinite.
    """
    tables: dict[str, RowTable | RateTable] = {}
    biases, choices, notes = {}, {}, {}
    for target, moments in _observed(model, selection.targets, calibration):
        name = target.name
        matrix = target.layout.fold(target.weight.detach()).float().cpu()
        size = min(group_size or target.layout.columns, target.layout.columns)
        given = (fixed or {}).get(name)
        own, bias = fisher[name], _free_bias(model, target, selection)
        if is_lookup(model, target):
            own = with_unseen(own)
        reached = bool(own.any())
        if given is None and not reached:
            given = MAX_BITS
        by_rate = coded and given is None
        widths = tuple(range(CHOICES if by_rate else WIDTHS)) if given is None else (given,)
        known = moments if moments is not None and moments.hessian.dim() > 2 else None
        if known is None:
            tables[name] = (
                rated_apart(matrix, own, size)
                if by_rate
                else nearest_rows(matrix, own, widths, size)
            )
            losses = tables[name].errors / 2
            why = (
                "its inputs' second moments are not known in full"
                if reached
                else "no batch reaches it"
            )
            notes[name] = f"rounded to nearest: {why}"
        else:
            centred = bias is not None
            tables[name] = (
                rated_rows(matrix, known, size, centred=centred)
                if by_rate
                else solve_rows(matrix, known, widths, size, centred=centred, knobs=ROWS)
            )
            losses = tables[name].errors * (output_curvature(own, known) / 2).unsqueeze(1)
            if bias is not None:
                biases[name] = bias
        if is_pruned(matrix):
            said = f"pruned: {int((matrix == 0).sum()):,} zeros kept by grids with exact zeros"
            notes[name] = f"{notes[name]}; {said}" if name in notes else said
        prices = tables[name].prices() if coded else None
        choices[name] = Choices(target.layout.columns, losses, widths, prices)
    if calibration is not None:
        steps = len(selection.targets)
        calibration.tell(selection.targets[-1].name, steps, steps)
    return Allocator(model, selection, tables, biases, frontier(choices), notes, calibration)


def smallest_weights(
    model: nn.Module,
    selection: Selection,
    *,
    group_size: int | None = None,
    fixed: Mapping[str, int] | None = None,
) -> QuantizedWeights:
    """Return weights that take as few bytes as any allocation can, known from the shapes alone.

    Every row is a constant, zero, but for weights whose width is given.

    Args:
        model: The float model.
        selection: What of it is quantized.
        group_size: Weights of a row that share a scale. None: the whole row.
        fixed: Name of a weight -> its width, where it is given.
    """
    tensors = {}
    for target in selection.targets:
        layout, width = target.layout, (fixed or {}).get(target.name, 0)
        size = min(group_size or layout.columns, layout.columns)
        codes = torch.zeros(layout.rows, layout.columns, dtype=torch.uint8)
        scale = torch.zeros(layout.rows, -(-layout.columns // size), dtype=torch.float16)
        bits = torch.full((layout.rows,), width, dtype=torch.uint8)
        coded = Coded(codes, Grid(scale, torch.full_like(scale, -1.0), row_levels(bits), size))
        tensors[target.name] = QuantizedTensor(coded, bits, layout, target.weight.dtype, "gptq")
    floats = rest_of(model, tensors, selection.aliases)
    lookups = lookups_of(model, selection.targets)
    return QuantizedWeights(tensors, floats, selection.aliases, selection.left, lookups=lookups)


def output_curvature(fisher: Tensor, moments: Moments) -> Tensor:
    """Return how fast the loss grows with each row's squared output error, float64 (rows,).

    That is E[g_y^2] of the row's output y, times the positions of a sample: E[g^2] of a weight is
    nearly that times E[x^2] of its input.

    Args:
        fisher: E[g^2], (rows, columns).
        moments: Of the inputs, H in full.

    Source:
        Martens and Grosse 2015, arXiv 1503.05671 (the Kronecker factors), with a diagonal for outputs.
    """
    energy = moments.hessian.diagonal(dim1=1, dim2=2).sum(1).double()
    rows = len(fisher) // len(energy)
    energy = energy.repeat_interleave(rows)
    return fisher.sum(1).double() / torch.where(energy > 0, energy, torch.inf)


def _observed(
    model: nn.Module, targets: Sequence[Target], calibration: Calibration | None
) -> Iterator[tuple[Target, Moments | None]]:
    """Yield each weight with the moments of its inputs, those of one pass held at a time."""
    known = [t for t in targets if calibration and not is_lookup(model, t)]
    twin, done = Twin(model), 0
    for group in _passes(known):
        assert calibration is not None  # noqa: S101 - without one no weight is known
        moments = observe((twin, twin), group, calibration)
        for target in group:
            calibration.tell(target.name, done, len(targets))
            done += 1
            yield target, moments.pop(target.name, None)
    for target in targets:
        if target not in known:
            yield target, None


def _passes(targets: Sequence[Target]) -> Iterator[list[Target]]:
    """Yield runs of weights whose second moments take no more memory together than one may alone."""
    group: list[Target] = []
    held = 0
    for target in targets:
        size = 4 * target.layout.columns**2
        if group and held + size > HESSIAN_LIMIT:
            yield group
            group, held = [], 0
        group.append(target)
        held += size
    if group:
        yield group


def _free_bias(model: nn.Module, target: Target, selection: Selection) -> str | None:
    """Return the state-dict key of the bias that may take up a weight's mean error; not a shared one."""
    bias = bias_of(model, target)
    name = target.name.removesuffix(target.attribute) + (bias or "")
    tied = {*selection.aliases, *selection.aliases.values()}
    return None if bias is None or name in tied else name
