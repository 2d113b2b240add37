"""A weight in blocks of codes, as onnxruntime's MatMulNBits takes it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.export.parts.onnx_weights import stored_width
from clipquant.quant.codes.grid import group, symmetric_zero
from clipquant.quant.codes.pack import pack
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize

LEAST_BLOCK = 16  # weights that share a scale, at least: what the operator takes
BLOCKS = (
    256,
    128,
)  # a channel's one scale is repeated for so many weights each: the quickest that fills up least
INT8, FLOAT = 4, 0  # accuracy levels: activations in blocks of int8, or as they are
_SAME = 1e-5  # of the largest weight


@dataclass(frozen=True)
class Blocks:
    """A weight as MatMulNBits takes it, `w = scale * (codes - point) - rest` of each block.

    Args:
        codes: uint8 (rows, blocks, block * bits / 8), lowest bits first.
        scale: float32 (rows, blocks).
        point: uint8 zero points of each row, packed like the codes.
        rest: float32 (rows, groups): what is fractional of the zeros, times the scale; None: nothing.
        bits: 2, 4 or 8.
        block: Weights that share a scale in the file.
        group: Weights that share a `rest`.
        columns: Inputs; the last block is filled up.
    """

    codes: Tensor
    scale: Tensor
    point: Tensor
    rest: Tensor | None
    bits: int
    block: int
    group: int
    columns: int


def blocks_of(tensor: QuantizedTensor, level: int = INT8) -> Blocks | str:
    """Return a weight as MatMulNBits takes it, or why it has no such form.

    Codes of 2 bits take 4 where onnxruntime has no quick product of 2: in blocks of 16, or in float.

    Args:
        tensor: The weight.
        level: What the activations are.
    """
    layout, columns = tensor.layout, tensor.layout.columns
    if len(layout.shape) != 2 or layout.axis != 0 or layout.groups != 1:
        return "no matrix of outputs by inputs"
    if tensor.dtype != torch.float32:
        return f"{str(tensor.dtype).removeprefix('torch.')}, not float32"
    size = tensor.group_size
    grouped = tensor.scale.shape[1] > 1
    if grouped and (size < LEAST_BLOCK or size & (size - 1)):
        return f"groups of {size}: no power of two from {LEAST_BLOCK} on"
    block = min(size, BLOCKS[0]) if grouped else min(BLOCKS, key=lambda wide: -columns % wide)
    bits, count = stored_width(tensor), -(-columns // block)
    if bits == 2 and (block == LEAST_BLOCK or level == FLOAT):
        bits = 4

    def repeated(part: Tensor) -> Tensor:
        wide = part.float().expand(layout.rows, -1)
        return wide.repeat_interleave(size // block if grouped else count, 1)[
            :, :count
        ].contiguous()

    zero = tensor.zero
    if zero is None:
        middle = torch.as_tensor(symmetric_zero(tensor.grid.levels), dtype=torch.float32)
        zero = middle.reshape(-1, 1).expand(layout.rows, 1)
        zero = zero.expand(layout.rows, tensor.scale.shape[1])
    zero = zero.float().expand(layout.rows, -1)
    whole = zero.round().clamp(0, 2**bits - 1)
    rest = tensor.scale.float() * (zero - whole)
    codes = group(tensor.codes, block)
    held = (codes.float() - repeated(whole)[..., None]) * repeated(tensor.scale)[..., None]
    held -= repeated(rest)[..., None]
    wanted = dequantize(tensor)
    apart = float((held.reshape(layout.rows, -1)[:, :columns] - wanted).abs().max())
    if not apart <= _SAME * float(wanted.abs().max().clamp(min=1e-30)):
        return "its values are not scale * (code - zero) in float32"
    return Blocks(
        _packed(codes.reshape(layout.rows, -1), bits).reshape(layout.rows, count, -1),
        repeated(tensor.scale),
        _packed(repeated(whole).to(torch.uint8), bits),
        rest if bool(rest.any()) else None,
        bits,
        block,
        size if grouped else columns,
        columns,
    )


def _packed(rows: Tensor, bits: int) -> Tensor:
    """Return each row of codes packed by itself, filled up to whole bytes."""
    each = 8 // bits
    filled = torch.nn.functional.pad(rows, (0, -rows.shape[1] % each))
    return pack(filled, bits).reshape(rows.shape[0], -1)
