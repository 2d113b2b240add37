"""Codes to bytes and back: dense, least significant bit first, in row order."""

from __future__ import annotations

import math

import torch
from torch import Tensor

_CHUNK = 1 << 20  # codes at a time: bounds the temporaries of the widths that straddle bytes


def pack(codes: Tensor, bits: int | Tensor) -> Tensor:
    """Return codes as dense bytes: bit k of the stream is bit `k % bits` of code `k // bits`.

    With one width the codes follow one another without a gap. With a width a row, each row starts
    on a byte of its own, so that any row can be read alone.

    Args:
        codes: uint8 (rows, columns), or of any shape with one width; each below `2**bits`.
        bits: Width 1 to 8, or uint8 (rows,) of widths 0 to 8.

    Returns:
        uint8 (bytes,), the last byte padded with zero bits.

    >>> pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2)
    tensor([57], dtype=torch.uint8)
    """
    if isinstance(bits, Tensor):
        return _pack_rows(codes, bits)
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.clone()
    return torch.cat([_pack_dense(part, bits) for part in torch.split(flat, _CHUNK)] or [flat])


def unpack(data: Tensor, bits: int | Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return the codes that `pack` turned into bytes.

    Args:
        data: uint8 (bytes,).
        bits: As given to `pack`, or 0: codes that are all zero and take no bytes.
        shape: Shape of the codes.

    Returns:
        uint8 of that shape.

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
        return data.clone().reshape(shape)
    if bits == 0:
        return torch.zeros(shape, dtype=torch.uint8, device=data.device)
    return _unpack_dense(data, bits)[: math.prod(shape)].reshape(shape)


def packed_bytes(bits: int | Tensor, shape: tuple[int, ...]) -> int:
    """Return how many bytes `pack` makes of codes of this shape.

    >>> packed_bytes(3, (3, 3))
    4
    """
    if isinstance(bits, Tensor):
        return int(_row_bytes(bits, shape[1]).sum())
    return (math.prod(shape) * bits + 7) // 8


def _row_bytes(bits: Tensor, columns: int) -> Tensor:
    return (bits.to(torch.int64) * columns + 7) // 8


def _pack_dense(codes: Tensor, bits: int) -> Tensor:
    """Pack a flat run of codes; eight codes of width b make b whole bytes."""
    numel = codes.numel()
    codes = torch.nn.functional.pad(codes, (0, -numel % 8)).reshape(-1, 8)
    if bits in (1, 2, 4):
        per_byte = 8 // bits
        codes = codes.reshape(-1, per_byte)
        out = codes[:, 0].clone()
        for i in range(1, per_byte):
            out |= codes[:, i] << (i * bits)
    else:
        shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
        words = (codes.to(torch.int64) << shifts).sum(1)
        out = (words[:, None] >> torch.arange(0, 8 * bits, 8, device=codes.device)) & 255
        out = out.to(torch.uint8).reshape(-1)
    return out[: (numel * bits + 7) // 8]


def _unpack_dense(data: Tensor, bits: int) -> Tensor:
    """Unpack a flat run of bytes into codes, the padding's included.

    All of it in uint8, where a shift to the left drops what leaves the byte, and in shapes that
    depend on no value, so that a graph can hold it.
    """
    mask = (1 << bits) - 1
    if bits in (1, 2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
        return ((data[:, None] >> shifts) & mask).reshape(-1)
    data = torch.nn.functional.pad(data, (0, -data.numel() % bits)).reshape(-1, bits)
    codes = []
    for first in range(0, 8 * bits, bits):  # eight codes of width b in b bytes
        byte, shift = divmod(first, 8)
        code = data[:, byte] >> shift
        if shift + bits > 8:
            code = code | (data[:, byte + 1] << (8 - shift))
        codes.append(code & mask)
    return torch.stack(codes, dim=1).reshape(-1)


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
