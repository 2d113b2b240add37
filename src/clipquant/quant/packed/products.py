"""Inputs times packed codes, in whole numbers where that is exact: an input becomes three digits of 8 bits.

Torch's kernel for whole numbers (`torch._int_mm`) reads a quarter of what floats take. Its kernels for packed weights
(`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`) either round inputs, scales and outputs to bfloat16, a hundred
times more than float32 does, or are slower than what they replace; so they are not used.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

from clipquant.quant.codes.grid import symmetric_zero
from clipquant.quant.packed.weight import BLOCK, PackedWeight

SPAN = 1 << 21  # weights whose codes are unpacked at a time, a byte each
_DIGIT = 254  # steps of a digit: from -127 to 127
_FEW = 12  # rows of digits up to which a call for each is quicker than one for all
_LEAST = 1e-30  # of a row of inputs: below it, they count as 0
_MOST = 128  # rows of inputs: beyond them, floats are as quick
_ALL = slice(None)
_COLUMNS = 1 << 16  # most of them: the sums of a digit times codes stay within 31 bits


def multiplies(weight: PackedWeight, x: Tensor) -> bool:
    """Return whether `product` gives `x @ weight.T`: for float32 inputs on the CPU, while no graph is traced."""
    columns, groups = weight.layout.columns, weight.scale.shape[1]
    return (
        weight.layout.numel > BLOCK
        and not torch.compiler.is_compiling()
        and x.device.type == weight.scale.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and weight.scale.dtype != torch.float64
        and (groups == 1 or columns == groups * weight.group_size)
        and not torch.is_autocast_enabled("cpu")
    )


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    """Return `x @ w.T` as exactly as float32 gives it, a span of rows at a time.

    Where a row has one scale and no gradient is asked for, each row of inputs becomes `top / 127 * (d0 + d1 / 254 +
    d2 / 254**2)` with whole digits from -127 to 127, within 2**-23 of its largest; their products with the codes,
    and with what was taken off these, are whole numbers. Elsewhere a span of codes becomes floats, times the scales of
    their groups.

    Args:
        x: float32 (..., columns).
        weight: As `multiplies` says.

    Returns:
        float32 (..., rows).
    """
    flat = x.reshape(-1, x.shape[-1])
    run = _by_digits if _has_digits(weight, flat) else _by_floats
    return run(flat, weight).reshape(*x.shape[:-1], weight.layout.rows)


def _has_digits(weight: PackedWeight, x: Tensor) -> bool:
    if torch.is_grad_enabled() and x.requires_grad:
        return False
    fit = 0 < len(x) <= _MOST and weight.layout.columns <= _COLUMNS
    return (
        fit
        and weight.scale.shape[1] == 1
        and whole_numbers_are_exact()
        and bool(x.isfinite().all())
    )


@functools.cache
def whole_numbers_are_exact() -> bool:
    """Return whether this processor's kernel for whole numbers is quick, and exact for the largest sums too.

    Some instructions of older processors add two products within 16 bits.
    """
    quick = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512", "AMX")
    if not (quick and torch.backends.mkldnn.is_available()):
        return False
    codes = torch.full((64, 256), -128, dtype=torch.int8)
    codes[1::2] = 127
    return all(_is_exact(codes, rows) for rows in (1, 2 * _FEW))


def _is_exact(codes: Tensor, rows: int) -> bool:
    digits = torch.full((rows, codes.shape[1]), 127, dtype=torch.int8)
    digits[:, ::3] = -127
    try:
        found = torch._int_mm(digits, codes.T)
    except (AttributeError, RuntimeError):  # a build of torch without it
        return False
    return torch.equal(found.long(), digits.long() @ codes.T.long())


def _by_digits(x: Tensor, weight: PackedWeight) -> Tensor:
    digits, step = _digits(x)
    sums = torch.zeros(len(digits), weight.layout.rows, dtype=torch.int32)
    middles = torch.zeros(weight.layout.rows, dtype=torch.float64)
    for rows, bits, start, stop in weight.spans(SPAN):
        planes, middle = weight.planes(bits, start, stop)
        middles[rows] = middle
        parts = [
            _times(digits[:, place :: len(planes)].contiguous(), codes)
            for place, codes in enumerate(planes)
        ]
        sums[:, rows] = sum(parts[1:], parts[0]) if parts else 0
    scale, zero = _grid(weight)
    total = _joined(digits.sum(1, dtype=torch.int32)[:, None], len(x))
    own = _joined(sums, len(x)).sub_(total * (zero.double().T - middles))
    return own.mul_(step).mul_(scale.double().T).float()


def _digits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return each input's digits, int8 (3 * rows, columns), and what the first is worth, float64 (rows, 1)."""
    top = x.abs().amax(1, keepdim=True).clamp(min=_LEAST)
    rest, digits = x * (127 / top), []
    for _ in range(3):
        digits.append(rest.round())
        rest = (rest - digits[-1]) * _DIGIT
    return torch.cat(digits).to(torch.int8), top.double() / 127


def _joined(digits: Tensor, rows: int) -> Tensor:
    """Return what sums of digits, int32 (3 * rows, ...), come to: float64 (rows, ...)."""
    first, second, third = digits.split(rows)
    joined: Tensor = third.double().div_(_DIGIT).add_(second).div_(_DIGIT).add_(first)
    return joined


def _times(digits: Tensor, codes: Tensor) -> Tensor:
    """Return `digits @ codes.T` in whole numbers."""
    if len(digits) > _FEW:
        sums: Tensor = torch._int_mm(digits, codes.T)
        return sums
    return torch.cat([torch._int_mm(row, codes.T) for row in digits.split(1)])


def _by_floats(x: Tensor, weight: PackedWeight) -> Tensor:
    out = x.new_empty(len(x), weight.layout.rows)
    for rows, bits, start, stop in weight.spans(SPAN // 4):
        planes, middle = weight.planes(bits, start, stop)
        scale, zero = _grid(weight, rows)
        if not planes:  # rows of 0 bits: every code is 0
            planes = [torch.zeros(stop - start, weight.layout.columns, dtype=torch.int8)]
        parts = [
            F.linear(x[:, place :: len(planes)], _floats(codes, scale, zero - middle))
            for place, codes in enumerate(planes)
        ]
        out[:, rows] = sum(parts[1:], parts[0])
    return out


def _floats(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Return what int8 codes (rows, columns) stand for, each run of columns of a group of its own."""
    grouped = codes.float().view(len(codes), scale.shape[1], -1)
    return grouped.sub_(zero.unsqueeze(-1)).mul_(scale.unsqueeze(-1)).view_as(codes)


def _grid(weight: PackedWeight, rows: slice | Tensor = _ALL) -> tuple[Tensor, Tensor]:
    """Return the scales and zeros of some rows, float32 (rows or 1, groups)."""
    scale = weight.scale[rows] if len(weight.scale) > 1 else weight.scale
    if weight.zero is None:
        return scale.float(), torch.full((1, 1), float(symmetric_zero(weight.levels or 0)))
    zero = weight.zero[rows] if len(weight.zero) > 1 else weight.zero
    return scale.float(), zero.float()
