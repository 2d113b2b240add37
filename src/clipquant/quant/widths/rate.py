"""One weight at steps from coarse to fine, with codes made for an entropy code: pruning and rounding in one choice."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid, group
from clipquant.quant.codes.zeros import is_pruned
from clipquant.quant.error.walk import Walk, gptq_codes, plan_walk
from clipquant.quant.network.moments import Moments
from clipquant.quant.widths.nearest import column_weights
from clipquant.quant.widths.rows import believed_hessian, damped_error, row_hessian
from clipquant.quant.widths.worth import FINEST, Stepped, worthy, worthy_apart

# How many steps a row's largest weight lies from zero: from most weights zero to nearly none, and the largest code.
_EXTENT = (0.25, 0.4, 0.6, 0.85, 1.2, 1.7, 2.5, 3.7, 5.5, 11.0, 24.0, 80.0)
_LIMITS = (1, 1, 1, 1, 1, 2, 3, 4, 6, 11, 24, 80)
_ALIKE = (1.0,) * len(_EXTENT)
_PULLS = (10.0, 9.0, 8.0, 6.0, 4.0, 4.0, 3.0, 2.0, 1.0, 1.0, 1.0, 1.0)  # measured: see `Stepped`
CHOICES = len(_EXTENT) + 1  # of a row: no code, or a step
_AT_ONCE = 1 << 23  # values worked on at once, as many weights at as many steps


@dataclass(frozen=True)
class RateTable:
    """A weight's codes at every step.

    Args:
        constants: (rows, groups): what each row is where it has no code.
        codes: int8 (12, rows, columns), at the steps from coarse to fine; 0 is zero.
        scale: (12, rows, groups): the steps.
        group_size: Columns that share a scale.
        errors: float64 (rows, 13): weighted squared error of each row without a code and at each step.
        bits: float64 (rows, 13): what its codes take in an entropy code.
        lost: (rows, 13): mean output that is lost, for a bias to give back; None: without one.
        method: What chose the codes.
    """

    constants: Tensor
    codes: Tensor
    scale: Tensor
    group_size: int
    errors: Tensor
    bits: Tensor
    lost: Tensor | None
    method: str

    def take(self, steps: Tensor) -> Coded:
        """Return the codes of rows at these steps, uint8 (rows,): 0, without a code, to 12, the finest."""
        codes, scale = self._picked(steps)
        widths = _widths(codes)
        none = (widths == 0)[:, None]
        middle = torch.where(widths > 0, 1 << (widths.long() - 1).clamp(min=0), 0)[:, None]
        zero = torch.where(none, -1.0, middle.to(scale.dtype)).expand_as(scale)
        constant = torch.where((steps == 0)[:, None], self.constants.to(scale.dtype), 0.0)
        levels = (1 << widths.long())[:, None] - 1
        grid = Grid(torch.where(none, constant, scale), zero.contiguous(), levels, self.group_size)
        return Coded((codes.to(torch.int16) + middle).to(torch.uint8), grid)

    def widths(self, steps: Tensor) -> Tensor:
        """Return the width of the codes of each row, uint8 (rows,): as many bits as its largest code asks for."""
        return _widths(self._picked(steps)[0])

    def prices(self) -> Tensor:
        """Return the bytes that each row's codes take in an entropy code, float64 (rows, 13)."""
        return self.bits / 8

    def shift(self, steps: Tensor) -> Tensor | None:
        """Return the mean output that rows at these steps lose, (rows,); None without a bias."""
        return None if self.lost is None else self.lost.gather(1, steps.long()[:, None])[:, 0]

    def _picked(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes and scales of rows at these steps."""
        place, rows = (steps.long() - 1).clamp(min=0), torch.arange(len(steps))
        codes = torch.where((steps == 0)[:, None], 0, self.codes[place, rows])
        return codes, self.scale[place, rows]


def rated_rows(matrix: Tensor, moments: Moments, group_size: int, *, centred: bool) -> RateTable:
    """Return a weight's codes at every step, by the error of its layer's outputs and the bits that they take.

    Args:
        matrix: float32 (rows, columns).
        moments: Of its inputs in the float network, H in full.
        group_size: Neighbouring columns that share a scale.
        centred: Leave the mean error out, since a bias will take it up.
    """
    kept = matrix == 0 if is_pruned(matrix) else None
    first, parts = 0, []
    for g, part in enumerate(matrix.chunk(moments.hessian.shape[0])):
        damped = damped_error(believed_hessian(row_hessian(moments, g, centred), moments))
        hessian, walk = damped.hessian, plan_walk(damped)
        mean = moments.mean[g] if centred else None
        for rows in _runs(part):
            held = None if kept is None else kept[first : first + len(rows)]
            start = _walked(_start(rows, group_size, _PULLS), rows, walk)
            found = worthy(start, rows, hessian, held)
            parts.append(_table(rows, found, hessian, mean))
            first += len(rows)
    return _stacked(parts, "rate")


def rated_apart(matrix: Tensor, fisher: Tensor, group_size: int) -> RateTable:
    """Return the same for a weight whose inputs are not known: by what each weight's error counts.

    Args:
        matrix: float32 (rows, columns).
        fisher: E[g^2] of each weight, (rows, columns).
        group_size: Neighbouring columns that share a scale.
    """
    kept = matrix == 0 if is_pruned(matrix) else None
    columns, first, parts = column_weights(fisher), 0, []
    for rows in _runs(matrix):
        span = slice(first, first + len(rows))
        weight = columns * fisher[span].mean(1, keepdim=True)
        held = None if kept is None else kept[span]
        found = worthy_apart(_start(rows, group_size, _ALIKE), rows, weight, held)
        parts.append(_table(rows, found, fisher[span].double(), None))
        first += len(rows)
    return _stacked(parts, "rate")


def _runs(matrix: Tensor) -> Iterator[Tensor]:
    """Yield runs of rows that are worked on together."""
    size = max(_AT_ONCE // (max(matrix.shape[1], 1) * len(_EXTENT)), 1)
    yield from matrix.split(size) if len(matrix) else ()


def _start(rows: Tensor, group_size: int, pulls: tuple[float, ...]) -> Stepped:
    """Return the nearest codes of some rows at every step."""
    extent = group(rows, group_size).abs().amax(2)
    scale = torch.cat([extent / steps for steps in _EXTENT])
    return Stepped.nearest(rows, scale, torch.tensor(_LIMITS), group_size, torch.tensor(pulls))


def _walked(start: Stepped, rows: Tensor, walk: Walk) -> Stepped:
    """Return the codes that GPTQ finds on the same grids."""
    tops = start.tops()
    zero = tops.to(start.scale.dtype).expand_as(start.scale).contiguous()
    grid = Grid(start.scale, zero, 2 * tops.long(), start.group_size)
    wide = rows.repeat(len(start.limits), 1)
    codes = gptq_codes(replace(walk, wanted=wide[:, walk.order]), grid).codes
    return replace(start, codes=codes.to(start.codes.dtype) - tops)


def _table(rows: Tensor, found: Stepped, error: Tensor, mean: Tensor | None) -> RateTable:
    """Return the table of some rows, their scales rounded to what a file holds.

    Args:
        rows: (rows, columns): the float weights.
        found: Their codes.
        error: (columns, columns): H; or float64 (rows, columns): what each weight's squared error counts.
        mean: Of the inputs, where a bias takes up the mean error.
    """
    steps, count = len(_EXTENT), len(rows)
    narrow = _narrow(found.scale)
    held = replace(found, scale=narrow)
    constants = _constants(rows, error, found.group_size)
    wide = group(torch.zeros_like(rows), found.group_size) + constants[:, :, None]
    flat = wide.reshape(count, -1)[:, : rows.shape[1]]
    values = torch.cat([flat, held.values()]).reshape(steps + 1, count, -1)
    off = values - rows
    if error.dtype == torch.float64:
        errors = (off.double().square() * error).sum(2)
    else:
        errors = ((off @ error) * off).sum(2, dtype=torch.float64)
    bits = torch.cat([torch.zeros(count, 1, dtype=torch.float64), held.bits()], 1)
    return RateTable(
        constants,
        found.codes.reshape(steps, count, -1).to(torch.int8),
        narrow.reshape(steps, count, -1),
        found.group_size,
        errors.clamp(min=0).T.contiguous(),
        bits,
        None if mean is None else -(off @ mean).T.contiguous(),
        "rate",
    )


def _constants(rows: Tensor, error: Tensor, group_size: int) -> Tensor:
    """Return the constant of each row, or group of a row: of least error, or zero where it is pruned."""
    if is_pruned(rows):
        return torch.zeros_like(group(rows, group_size)[:, :, 0])
    counts = error.sum(0, keepdim=True) if error.dtype != torch.float64 else error + 1e-30
    held, weight = (
        group(rows, group_size).double(),
        group(counts.expand_as(rows), group_size).double(),
    )
    whole = weight.sum(2)
    middle = torch.where(whole > 0, (held * weight).sum(2) / whole, held.mean(2))
    first = held[:, :, 0]
    constant = (held == held[:, :, :1]).all(2)
    return torch.where(constant, first.float(), _narrow(middle.float()))


def _narrow(scale: Tensor) -> Tensor:
    """Return steps in float16 values where these hold them all."""
    half = scale.half()
    fits = torch.isfinite(half) & (half.abs() >= 2.0**-14) | (scale == 0)
    return half.to(scale.dtype) if bool(fits.all()) else scale


def _widths(codes: Tensor) -> Tensor:
    """Return the bits that rows of codes around zero take, uint8 (rows,); none where all are zero."""
    codes = codes.to(torch.int16)
    most = torch.maximum(-codes.amin(1), codes.amax(1) + 1) if codes.shape[1] else codes.sum(1)
    edges = torch.tensor([1 << width for width in range(FINEST.bit_length())])
    widths = torch.searchsorted(edges, most.contiguous()) + 1
    return torch.where((codes == 0).all(1), 0, widths).to(torch.uint8)


def _stacked(parts: list[RateTable], method: str) -> RateTable:
    """Return the tables of consecutive rows as one, in float16 where that holds all steps."""
    first = parts[0]
    scale = torch.cat([part.scale for part in parts], 1)
    constants = torch.cat([part.constants for part in parts])
    whole = torch.cat([scale.flatten(), constants.flatten()])
    exact = bool((whole.half().to(whole.dtype) == whole).all())
    dtype = torch.float16 if exact else torch.float32
    lost = [part.lost for part in parts if part.lost is not None]
    return RateTable(
        constants.to(dtype),
        torch.cat([part.codes for part in parts], 1),
        scale.to(dtype),
        first.group_size,
        torch.cat([part.errors for part in parts]),
        torch.cat([part.bits for part in parts]),
        torch.cat(lost) if lost else None,
        method,
    )
