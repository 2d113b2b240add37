"""What shares a scale, where the user does not say: a channel, or as few weights as pay for their scales."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.ranges import minmax_grid, mse_grid
from clipquant.quant.codes.spec import Granularity, QuantSpec

GROUPS = (128, 64, 32)
SHORT_LOOKUP = 1.0  # the same of rows that are looked up, whose errors no sum averages out
SHORT = 3.0  # dB that a channel's scale may fall short of what it reaches on normally distributed weights
NORMAL = {1: 4.40, 2: 9.25, 3: 14.27, 4: 19.38, 5: 24.57, 6: 29.83}  # dB, Max 1960, uniform steps
_SCALE_BITS = 16  # of a scale, and of a zero beside it
_SAMPLE = (
    1 << 22
)  # weights that are looked at: rows with outliers are few, and a sample may miss them


def fitting_granularity(matrix: Tensor, spec: QuantSpec, short: float = SHORT) -> Granularity:
    """Return "channel" where one scale a channel holds, else the group size that pays best.

    A channel's scale holds where the signal-to-noise ratio of the weights is at most 3 dB below that of
    normally distributed weights on their best uniform grid, so that a few large weights do not cost all
    others their bits. Where it does not hold, groups of 128, 64 and 32 are tried. A scale a group makes
    a weight dearer by some share of a bit, and a bit of width is worth a quarter of the squared error:
    the group size of least error times 4 to that share is taken, or the channel where that is less.

    Args:
        matrix: Floating (rows, columns); of large ones evenly spaced rows are looked at.
        spec: Its steps and symmetry.
        short: dB that a channel may fall short; see `SHORT_LOOKUP`.

    Source:
        Max 1960, "Quantizing for minimum distortion", table II (uniform steps on a normal distribution).

    >>> _ = torch.manual_seed(0)
    >>> plain, outliers = torch.randn(8, 256), torch.randn(8, 256)
    >>> outliers[:, 3] *= 30
    >>> fitting_granularity(plain, QuantSpec(4)), fitting_granularity(outliers, QuantSpec(4))
    ('channel', 64)
    """
    limit = NORMAL.get(spec.width)
    if limit is None or spec.levels is not None or matrix.shape[1] <= GROUPS[-1]:
        return "channel"
    rows = matrix[:: max(matrix.numel() // _SAMPLE, 1)].float()
    allowed = float(rows.square().sum()) / 10 ** ((limit - short) / 10)
    # The whole range is never better than the best, so that where it holds nothing has to be searched.
    if _squared(rows, minmax_grid(rows, spec)) <= allowed:
        return "channel"
    error = _error(rows, spec)
    if not 0 < error < math.inf or error <= allowed:
        return "channel"
    tried: dict[Granularity, float] = {"channel": error}
    for size in (size for size in GROUPS if size < matrix.shape[1]):
        share = _SCALE_BITS * (1 if spec.symmetric else 2) / size
        tried[size] = _error(rows, replace(spec, granularity=size)) * 4**share
    return min(tried, key=lambda granularity: tried[granularity])


def _error(matrix: Tensor, spec: QuantSpec) -> float:
    return _squared(matrix, mse_grid(matrix, spec))


def _squared(matrix: Tensor, grid: Grid) -> float:
    off = Coded.nearest(matrix, grid).values() - matrix
    return float(off.square().sum(dtype=torch.float64))
