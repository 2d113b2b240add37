"""A quantized weight's parts out of a file: each value checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from clipquant.artifact.envelope import ROOM, Opened
from clipquant.artifact.fault import ArtifactError
from clipquant.quant.codes.grid import Coded, Grid, row_levels
from clipquant.quant.codes.pack import PackedTensor, packed_bytes, unpack
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.tensor import QuantizedTensor

_CHUNK = 1 << 20  # codes looked at together; of any width they end on a byte


@dataclass(frozen=True)
class Parts:
    """A file's parts, and its name for errors."""

    opened: Opened
    path: str | Path

    def fault(self, said: str) -> ArtifactError:
        return ArtifactError(
            f"{self.path} is damaged or made to do harm: {said} Fetch it again from where it was written."
        )

    def bits(self, name: str) -> int | Tensor:
        """Return the width of a weight's codes, or that of each row."""
        width = self.opened.manifest.weights[name].bits
        if width is not None:
            return width
        bits = self.opened.tensor(f"{name}.bits")
        if len(bits) and int(bits.max()) > MAX_BITS:
            raise self.fault(f"{name}.bits must be from 0 to {MAX_BITS}; got {int(bits.max())}.")
        return bits

    def grid(self, name: str, bits: int | Tensor) -> Grid:
        """Return the values that a weight's codes stand for."""
        weight = self.opened.manifest.weights[name]
        scale = self._finite(f"{name}.scale")
        zero = (
            self._finite(f"{name}.zero") if f"{name}.zero" in self.opened.manifest.entries else None
        )
        levels = row_levels(bits) if isinstance(bits, Tensor) else weight.levels or 0
        return Grid(scale, zero, levels, weight.group_size)

    def _finite(self, key: str) -> Tensor:
        values = self.opened.tensor(key)
        if not bool(torch.isfinite(values).all()):
            raise self.fault(f"{key} must be finite; it holds NaN or infinity.")
        return values

    def check_constants(self, known: Mapping[str, tuple[int, ...]], most: int | None) -> None:
        """Raise where rows of 0 bits, for which a file pays nothing, would take too much memory."""
        manifest = self.opened.manifest
        room = ROOM + 2 * len(self.opened.data) if most is None else most
        need = 0
        for name, weight in manifest.weights.items():
            bits = self.bits(name)
            if isinstance(bits, Tensor) and weight.layout.shape != known.get(name):
                need += int((bits == 0).sum()) * weight.layout.columns * (weight.dtype.itemsize + 1)
        if need > room:
            raise ArtifactError(
                f"{self.path} has rows of 0 bits that would take {need:,} bytes of memory; without a model "
                f"they may take {room:,}. Pass the model that it is to be loaded into, or set "
                "max_constant_bytes if you trust the file."
            )


def packed_weight(parts: Parts, name: str) -> PackedTensor:
    """Return a weight as its bytes."""
    weight, bits = parts.opened.manifest.weights[name], parts.bits(name)
    grid = parts.grid(name, bits)
    data = _codes(parts, name, bits)
    return PackedTensor(data, grid, bits, weight.layout, weight.dtype, weight.method)


def unpacked_weight(parts: Parts, name: str) -> QuantizedTensor:
    """Return a weight as its codes."""
    packed = packed_weight(parts, name)
    shape = (packed.layout.rows, packed.layout.columns)
    return _tensor(packed, unpack(packed.data, packed.bits, shape))


def outline(parts: Parts, name: str) -> QuantizedTensor:
    """Return a weight whose codes were looked at and take no memory."""
    packed = packed_weight(parts, name)
    shape = (packed.layout.rows, packed.layout.columns)
    return _tensor(packed, torch.empty(shape, dtype=torch.uint8, device="meta"))


def _tensor(packed: PackedTensor, codes: Tensor) -> QuantizedTensor:
    coded = Coded(codes, packed.grid)
    return QuantizedTensor(coded, packed.bits, packed.layout, packed.dtype, packed.method)


def _codes(parts: Parts, name: str, bits: int | Tensor) -> Tensor:
    """Return a weight's bytes, as many as its codes take, and none of them beyond the grid."""
    weight = parts.opened.manifest.weights[name]
    data = parts.opened.tensor(f"{name}.q")
    if isinstance(bits, Tensor):
        wanted = _row_bytes(bits, weight.layout.columns)
        if len(data) != wanted:
            raise parts.fault(f"{name}.q must be of {wanted:,} bytes; got {len(data):,}.")
        return data
    levels = weight.levels or 0
    if levels < 2**bits - 1 and (top := _largest(data, bits, weight.layout.numel)) > levels:
        raise parts.fault(f"{name}.q must hold codes from 0 to {levels}; got {top}.")
    return data


def _row_bytes(bits: Tensor, columns: int) -> int:
    """Return what rows of these widths take, in whole numbers that do not overflow."""
    counts = torch.bincount(bits.long(), minlength=MAX_BITS + 1).tolist()
    return sum(count * ((width * columns + 7) // 8) for width, count in enumerate(counts))


def _largest(data: Tensor, bits: int, numel: int) -> int:
    """Return the largest code, a few of them unpacked at a time."""
    most = 0
    for start in range(0, numel, _CHUNK):
        count = min(_CHUNK, numel - start)
        first = start * bits // 8
        part = data[first : first + packed_bytes(bits, (count,))]
        most = max(most, int(unpack(part, bits, (count,)).max()))
    return most
