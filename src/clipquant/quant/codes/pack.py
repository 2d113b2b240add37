"""Codes to bytes and back: dense, least significant bit first, in row order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.tensor import QuantizedTensor

_CHUNK = 1 << 20  # codes at a time: their temporaries stay in a processor's cache


def pack(codes: Tensor, bits: int | Tensor) -> Tensor:
    """Return codes as dense bytes: bit k of the stream is bit `k % bits` of code `k // bits`.

    With one width the codes follow one another without a gap. With a width a row, each row starts
    on a byte of its own, so that any row can be read alone.

    Args:
        codes: uint8 (rows, columns), or of any shape with one width; each below `2**bits`.
        bits: Width 1 to 8, or uint8 (rows,) of widths 0 to 8.

    Returns:
        uint8 (bytes,), the last byte padded with zero bits; a view of codes of 8 bits.

    >>> pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2)
    tensor([57], dtype=torch.uint8)
    """
    if isinstance(bits, Tensor):
        return _pack_rows(codes, bits)
    flat = codes.reshape(-1)
    if bits == 8:
        return flat
    return torch.cat([_pack_dense(part, bits) for part in torch.split(flat, _CHUNK)] or [flat])


def unpack(data: Tensor, bits: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` turned into bytes.

    Args:
        data: uint8 (bytes,).
        bits: As given to `pack`, or 0: codes that are all zero and take no bytes.
        shape: Shape of the codes.

    Returns:
        uint8 of that shape; a view of `data` at 8 bits.

    Raises:
        ValueError: If `data` is not as long as these codes are.

    >>> unpack(torch.tensor([57], dtype=torch.uint8), 2, (2, 2))
    tensor([[1, 2],
            [3, 0]], dtype=torch.uint8)
    """
    expected = packed_bytes(bits, shape)
    if data.numel() != expected:
        raise ValueError(f"codes of shape {shape} take {expected} bytes; got {data.numel()}.")
    if isinstance(bits, Tensor):
        return _unpack_rows(data, bits, shape[1])
    if bits == 8:
        return data.reshape(shape)
    if bits == 0:
        return torch.zeros(shape, dtype=torch.uint8, device=data.device)
    numel = math.prod(shape)
    if numel <= _CHUNK or torch.compiler.is_compiling():  # a graph would hold every chunk's nodes
        return _unpack_dense(data, bits)[:numel].reshape(shape)
    codes = torch.empty(numel, dtype=torch.uint8, device=data.device)
    for start in range(0, numel, _CHUNK):
        part = codes[start : start + _CHUNK]
        end = packed_bytes(bits, (start + len(part),))
        part.copy_(_unpack_dense(data[start * bits // 8 : end], bits)[: len(part)])
    return codes.reshape(shape)


def packed_bytes(bits: int | Tensor, shape: tuple[int, ...]) -> int:
    """Return how many bytes `pack` makes of codes of this shape.

    >>> packed_bytes(3, (3, 3))
    4
    """
    if isinstance(bits, Tensor):
        return int(_row_bytes(bits, shape[1]).sum())
    return (math.prod(shape) * bits + 7) // 8


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight whose codes are dense bytes; everything else as in `QuantizedTensor`.

    Args:
        data: uint8 (bytes,), as `pack` makes them.
        grid: The values that the codes stand for.
        bits: Width of a code, or uint8 (rows,) where each row has its own, 0 to 8.
        layout: How the matrix folds back into the weight.
        dtype: Floating dtype of the weight.
        method: Name of the method that chose the codes.
    """

    data: Tensor
    grid: Grid
    bits: int | Tensor
    layout: Layout
    dtype: torch.dtype
    method: str = "rtn"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix of codes."""
        return self.layout.rows, self.layout.columns


def pack_tensor(tensor: QuantizedTensor) -> PackedTensor:
    """Return a quantized weight with its codes packed.

    >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 3, 4)
    >>> coded = Coded(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8), grid)
    >>> pack_tensor(QuantizedTensor(coded, 2, Layout((1, 4)), torch.float32)).data
    tensor([228], dtype=torch.uint8)
    """
    data = pack(tensor.codes, tensor.bits)
    return PackedTensor(data, tensor.grid, tensor.bits, tensor.layout, tensor.dtype, tensor.method)


def unpack_tensor(packed: PackedTensor) -> QuantizedTensor:
    """Return a packed weight with its codes unpacked: the inverse of `pack_tensor`."""
    coded = Coded(unpack(packed.data, packed.bits, packed.shape), packed.grid)
    return QuantizedTensor(coded, packed.bits, packed.layout, packed.dtype, packed.method)


def _row_bytes(bits: Tensor, columns: int) -> Tensor:
    return (bits.to(torch.int64) * columns + 7) // 8


def _pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack a flat run of codes: those in a word move together until they fill whole bytes."""
    numel = codes.numel()
    per_word, dtype = _word(bits)
    words = torch.nn.functional.pad(codes, (0, -numel % 8)).view(dtype)
    for lane in _lanes(per_word):
        taken = bits * lane // 8
        low, high = (_mask(taken, 2 * lane, at, per_word) for at in (0, taken))
        words = (words & low).bitwise_or_((words >> (lane - taken)).bitwise_and_(high))
    used = words.view(torch.uint8).reshape(-1, per_word)[:, : per_word * bits // 8]
    return used.reshape(-1)[: (numel * bits + 7) // 8]


def _unpack_dense(data: Tensor, bits: int) -> Tensor:
    """Unpack a flat run of bytes into codes, the padding's included: the inverse of `_pack_dense`.

    In shapes that depend on no value, so that a graph can hold it.
    """
    per_word, dtype = _word(bits)
    if per_word < 8 or bits == 1:
        words = data.to(dtype)
    else:
        used = torch.nn.functional.pad(data, (0, -data.numel() % bits)).reshape(-1, bits)
        words = torch.nn.functional.pad(used, (0, 8 - bits)).view(dtype)[:, 0]
    for lane in reversed(_lanes(per_word)):
        taken = bits * lane // 8
        low, high = (_mask(taken, 2 * lane, at, per_word) for at in (0, lane))
        words = (words & low).bitwise_or_((words << (lane - taken)).bitwise_and_(high))
    return words.view(torch.uint8)


def _word(bits: int) -> tuple[int, torch.dtype]:
    """Return the fewest codes that fill whole bytes, and the dtype in which each takes a byte."""
    return {1: (8, torch.int64), 2: (4, torch.int32), 4: (2, torch.int16)}.get(
        bits, (8, torch.int64)
    )


def _lanes(per_word: int) -> tuple[int, ...]:
    """Return the widths in bits of the halves that move together, the narrowest first."""
    return tuple(lane for lane in (8, 16, 32) if lane < 8 * per_word)


def _mask(width: int, lane: int, shift: int, size: int) -> int:
    """Return a signed word of `size` bytes with `width` bits set in each lane, `shift` above its lowest."""
    word = sum(((1 << width) - 1) << (start + shift) for start in range(0, 8 * size, lane))
    return word - (1 << 8 * size) if word >> (8 * size - 1) else word


def _pack_rows(codes: Tensor, bits: Tensor) -> Tensor:
    columns = codes.shape[1]
    sizes = _row_bytes(bits, columns)
    ends = sizes.cumsum(0)
    out = torch.zeros(int(sizes.sum()), dtype=torch.uint8, device=codes.device)
    for width in torch.unique(bits).tolist():
        if width:
            index = (bits == width).nonzero().squeeze(1)
            padded = torch.nn.functional.pad(codes[index], (0, -columns % 8))
            packed = pack(padded, width).reshape(len(index), -1)
            size = int(sizes[index[0]])
            where = (ends - sizes)[index, None] + torch.arange(size, device=codes.device)
            out[where] = packed[:, :size]
    return out


def _unpack_rows(data: Tensor, bits: Tensor, columns: int) -> Tensor:
    sizes = _row_bytes(bits, columns)
    starts = sizes.cumsum(0) - sizes
    codes = torch.zeros(len(bits), columns, dtype=torch.uint8, device=data.device)
    for width in torch.unique(bits).tolist():
        if width:
            index = (bits == width).nonzero().squeeze(1)
            size = int(sizes[index[0]])
            rows = data[starts[index, None] + torch.arange(size, device=data.device)]
            rows = torch.nn.functional.pad(rows, (0, -size % width))
            whole = rows.shape[1] * 8 // width
            codes[index] = unpack(rows.reshape(-1), width, (len(index), whole))[:, :columns]
    return codes
