"""A quantized weight's parts out of a file: each value checked before it is used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from clipquant.artifact.envelope import ROOM, Opened
from clipquant.artifact.fault import ArtifactError
from clipquant.artifact.schema import Weight
from clipquant.errors import MissingPackageError
from clipquant.quant.codes.entropy import LIBRARY, StreamError, decode
from clipquant.quant.codes.grid import Coded, Grid, row_levels
from clipquant.quant.codes.pack import PackedTensor, pack_tensor, packed_bytes, unpack
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.tensor import QuantizedTensor

_STREAMED = 4  # a code out of a stream takes as long as four that are dense
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
        """Raise where codes for which a file pays nothing, or next to nothing, would take too much memory."""
        manifest = self.opened.manifest
        unknown = [n for n, w in manifest.weights.items() if w.layout.shape != known.get(n)]
        for coded, what in ((False, "rows of 0 bits"), (True, "codes of far less than a bit")):
            need = sum(self._unpaid(n) for n in unknown if manifest.weights[n].coded is coded)
            room = self._room(coded) if most is None else most
            if need > room:
                raise ArtifactError(
                    f"{self.path} has {what} that would take {need:,} bytes of memory; without a model "
                    f"they may take {room:,}. Pass the model that it is to be loaded into, or set "
                    "max_constant_bytes if you trust the file."
                )

    def affords(self, name: str) -> bool:
        """Return whether the file has paid for the memory that a weight takes without a model of its shape."""
        return self._unpaid(name) <= self._room(self.opened.manifest.weights[name].coded)

    def _room(self, coded: bool) -> int:
        """Return the bytes that what is not paid for may take: less for streams, which take time as well."""
        room = ROOM + 2 * len(self.opened.data)
        return room // _STREAMED if coded else room

    def _unpaid(self, name: str) -> int:
        """Return the bytes of memory of a weight beyond what as many bytes of dense codes of 1 bit would take."""
        weight, bits = self.opened.manifest.weights[name], self.bits(name)
        size, layout = weight.dtype.itemsize + 1, weight.layout
        if weight.coded:
            entry = self.opened.manifest.entries[f"{name}.q"]
            return max(layout.numel - 8 * (entry.stop - entry.start), 0) * size
        return int((bits == 0).sum()) * layout.columns * size if isinstance(bits, Tensor) else 0


def packed_weight(parts: Parts, name: str) -> PackedTensor:
    """Return a weight as its dense bytes, whatever the file holds."""
    weight, bits = parts.opened.manifest.weights[name], parts.bits(name)
    if weight.coded:
        return pack_tensor(unpacked_weight(parts, name))
    grid, data = parts.grid(name, bits), _codes(parts, name, bits)
    return PackedTensor(data, grid, bits, weight.layout, weight.dtype, weight.method)


def unpacked_weight(parts: Parts, name: str) -> QuantizedTensor:
    """Return a weight as its codes."""
    weight, bits = parts.opened.manifest.weights[name], parts.bits(name)
    shape, grid = (weight.layout.rows, weight.layout.columns), parts.grid(name, bits)
    if not weight.coded:
        return _tensor(weight, bits, grid, unpack(_codes(parts, name, bits), bits, shape))
    stream = parts.opened.tensor(f"{name}.q")
    try:
        codes = decode(stream, grid, bits, shape)
    except StreamError as error:
        raise parts.fault(f"{name}.q must be a stream of {shape} codes; {error}.") from error
    except MissingPackageError as error:
        raise ArtifactError(f"{parts.path} cannot be read here: {error}") from error
    return _tensor(weight, bits, grid, codes, stream)


def outline(parts: Parts, name: str) -> QuantizedTensor:
    """Return a weight whose codes were looked at and take no memory.

    A stream is looked at where its library is installed and the file has paid for the codes.
    """
    weight, bits = parts.opened.manifest.weights[name], parts.bits(name)
    grid, stream = parts.grid(name, bits), None
    if not weight.coded:
        _codes(parts, name, bits)
    elif not parts.affords(name) or find_spec(LIBRARY) is None:
        stream = parts.opened.tensor(f"{name}.q")
    else:
        stream = unpacked_weight(parts, name).stream
    shape = (weight.layout.rows, weight.layout.columns)
    return _tensor(weight, bits, grid, torch.empty(shape, dtype=torch.uint8, device="meta"), stream)


def _tensor(
    weight: Weight, bits: int | Tensor, grid: Grid, codes: Tensor, stream: Tensor | None = None
) -> QuantizedTensor:
    coded = Coded(codes, grid)
    return QuantizedTensor(coded, bits, weight.layout, weight.dtype, weight.method, stream)


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
