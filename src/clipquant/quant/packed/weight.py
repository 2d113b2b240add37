"""A weight that stays packed in memory: its bytes, and the rows that are dequantized from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from clipquant.quant.codes.grid import Grid, dequantize_rows, row_levels, symmetric_zero
from clipquant.quant.codes.pack import PackedTensor, pack, packed_bytes, unpack

BLOCK = 1 << 17  # weights dequantized at a time: with their codes, two megabytes


class PackedWeight(nn.Module):
    """A weight held as packed codes: `forward()` returns it dequantized, and keeps nothing.

    Layers that can use a part of it at a time ask for `blocks()`, `lookup()` or `spans()` and their `planes()`.

    Its buffers are the bytes of each width in use (`codes4`), `scale`, `zero` where the grid has
    one, and where rows differ in width `order`, the place of each row among them. They keep their
    dtypes under `.half()` and the like; the dtype of the weight follows. Codes of 8 bits of a large matrix are held
    less 128 (`signed8`), as the processor multiplies them.

    Args:
        packed: The weight.

    >>> from clipquant.quant.codes.layout import Layout
    >>> grid = Grid(torch.ones(1, 1), torch.zeros(1, 1), 3, 4)
    >>> data = torch.tensor([228], dtype=torch.uint8)
    >>> PackedWeight(PackedTensor(data, grid, 2, Layout((1, 4)), torch.float32))()
    tensor([[0., 1., 2., 3.]])
    """

    scale: Tensor
    zero: Tensor | None
    order: Tensor | None

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        levels, self.layout = packed.grid.levels, packed.layout
        self.levels = levels if isinstance(levels, int) else None
        self.group_size = packed.grid.group_size
        self.dtype, self.method = packed.dtype, packed.method
        blocks, order = _by_width(packed)
        self.rows = {bits: rows for bits, (rows, _) in blocks.items()}
        self.signed = len(self.layout.shape) == 2 and self.layout.numel > BLOCK
        for bits, (_, data) in blocks.items():
            signed = self.signed and bits == 8
            self.register_buffer(self._name(bits), data ^ 128 if signed else data)
        self.register_buffer("scale", packed.grid.scale)
        self.register_buffer("zero", _explicit_zero(packed))
        self.register_buffer("order", order)

    def forward(self) -> Tensor:
        """Return the weight in its shape and dtype."""
        return self.layout.unfold(self._matrix()).contiguous()

    def _matrix(self) -> Tensor:
        if self.whole:
            parts = [part for _, part in self.blocks()]
            return parts[0] if len(parts) == 1 else self.in_order(torch.cat(parts))
        shape = (self.layout.rows, self.layout.columns)
        matrix = torch.empty(shape, dtype=self.dtype, device=self.scale.device)
        for rows, part in self.blocks():
            matrix[rows] = part
        return matrix

    @property
    def whole(self) -> bool:
        """Whether all rows of a width are dequantized at once: they are few, or a graph is traced."""
        return self.layout.numel <= BLOCK or torch.compiler.is_compiling()

    def blocks(self) -> Iterator[tuple[slice | Tensor, Tensor]]:
        """Yield which rows, and their weights (rows, columns), in the order in which they are held.

        A block has at most 2**17 weights, or eight rows where those are more, and begins on a byte.
        """
        for rows, bits, start, stop in self.spans(self.layout.numel if self.whole else BLOCK):
            yield rows, self._values(self._unpacked(bits, start, stop), rows)

    def spans(self, weights: int) -> Iterator[tuple[slice | Tensor, int, int, int]]:
        """Yield which rows, their width, and their first and last place among those of that width.

        Args:
            weights: Most of them in a span, or eight rows where those are more; each begins on a byte.
        """
        held = None if self.order is None else torch.argsort(self.order)
        first = 0
        for bits, count in self.rows.items():
            size = max(weights // max(self.layout.columns, 1) // 8, 1) * 8
            size = count if self.layout.numel <= weights else size
            for start in range(0, count, size):
                stop = min(start + size, count)
                span = slice(first + start, first + stop)
                yield span if held is None else held[span], bits, start, stop
            first += count

    def planes(self, bits: int, start: int, stop: int) -> tuple[list[Tensor], int]:
        """Return the codes of a span as a byte holds them, and what was taken off each.

        Returns:
            Int8 (rows, columns / n), n of them: the first has columns 0, n, 2 n and so on; and an integer. Those of
            8 bits are a view of what is held.
        """
        if bits == 0:
            return [], 0
        columns = self.layout.columns
        each = 8 // bits if bits in (1, 2, 4) else 1
        if each > 1 and columns % each == 0 and self.group_size % each == 0:
            ends = (packed_bytes(bits, (row, columns)) for row in (start, stop))
            data, mask = self._held(bits)[slice(*ends)].view(stop - start, -1), 2**bits - 1
            shifted = (data >> bits * place if place else data for place in range(each))
            return [part.bitwise_and(mask).view(torch.int8) for part in shifted], 0
        if bits < 8:
            return [self._unpacked(bits, start, stop).view(torch.int8)], 0
        held = self._held(8)[start * columns : stop * columns].view(stop - start, columns)
        return [(held if self.signed else held ^ 128).view(torch.int8)], 128

    def in_order(self, held: Tensor, dim: int = 0) -> Tensor:
        """Return what has an entry a held row along `dim` with those entries in the weight's order."""
        return held if self.order is None else held.index_select(dim, self.order)

    def lookup(self, index: Tensor) -> Tensor:
        """Return rows of the matrix, of which no other is dequantized.

        Args:
            index: Integer (n,).

        Returns:
            (n, columns), in the weight's dtype.

        Raises:
            IndexError: If an index is none of a row.
        """
        rows, columns = self.layout.rows, self.layout.columns
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < rows:
            raise IndexError(f"index out of range: a row is 0 to {rows - 1}; got {index.tolist()}.")
        found = torch.empty(len(index), columns, dtype=self.dtype, device=self.scale.device)
        size = BLOCK // columns + 1
        for start in range(0, len(index), size):
            part = index[start : start + size]
            found[start : start + size] = self._values(self._picked(part), part)
        return found

    def _picked(self, index: Tensor) -> Tensor:
        """Return the codes of some rows."""
        if self.order is None:
            return self._gathered(next(iter(self.rows)), index)
        place, first = self.order[index], 0
        codes = torch.zeros(len(index), self.layout.columns, dtype=torch.uint8, device=index.device)
        for bits, count in self.rows.items():
            own = (place >= first) & (place < first + count)
            codes[own] = self._gathered(bits, place[own] - first)
            first += count
        return codes

    def _gathered(self, bits: int, index: Tensor) -> Tensor:
        """Return the codes of some of the rows of one width, read from the fewest whole bytes."""
        columns, data = self.layout.columns, self._held(bits)
        unit = 8 // math.gcd(8, columns * bits)  # rows that fill whole bytes
        size = unit * columns * bits // 8
        unit_index = index // unit
        if len(data) == self.rows[bits] // unit * size:
            taken = data.view(-1, size).index_select(0, unit_index) if size else data
        else:  # the last rows do not fill their unit
            places = unit_index[:, None] * size + torch.arange(size, device=index.device)
            taken = data[places.clamp_(max=len(data) - 1)]
        codes = self._plain(unpack(taken.reshape(-1), bits, (len(index) * unit, columns)), bits)
        places = torch.arange(len(index), device=index.device) * unit + index % unit
        return codes if unit == 1 else codes.index_select(0, places)

    def _unpacked(self, bits: int, start: int, stop: int) -> Tensor:
        """Return the codes of rows `start` to `stop` of those of one width."""
        columns = self.layout.columns
        ends = (packed_bytes(bits, (row, columns)) for row in (start, stop))
        held = self._held(bits)[slice(*ends)]
        return self._plain(unpack(held, bits, (stop - start, columns)), bits)

    def _plain(self, codes: Tensor, bits: int) -> Tensor:
        return codes ^ 128 if self.signed and bits == 8 else codes

    def _values(self, codes: Tensor, rows: slice | Tensor) -> Tensor:
        """Return the weights that the codes of some rows stand for."""
        scale = self.scale[rows] if len(self.scale) > 1 else self.scale
        zero = self.zero[rows] if self.zero is not None and len(self.zero) > 1 else self.zero
        grid = Grid(scale, zero, self.levels or 0, self.group_size)
        return dequantize_rows(codes, grid).to(self.dtype)

    def extra_repr(self) -> str:
        widths = ", ".join(f"{n} rows of {b} bits" for b, n in self.rows.items())
        return f"{self.layout.shape}, {widths}, {self.method}"

    def _name(self, bits: int) -> str:
        return "signed8" if self.signed and bits == 8 else f"codes{bits}"

    def _held(self, bits: int) -> Tensor:
        held: Tensor = getattr(self, self._name(bits))
        return held

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Move the buffers as `fn` does; let only the dtype of the weight follow it."""
        self.dtype = fn(self.scale.new_empty(0, dtype=self.dtype)).dtype

        def move(buffer: Tensor) -> Tensor:
            moved = fn(buffer)
            return moved if moved.dtype == buffer.dtype else buffer.to(moved.device)

        super()._apply(move, recurse)  # type: ignore[no-untyped-call]
        return self


def _by_width(packed: PackedTensor) -> tuple[dict[int, tuple[int, Tensor]], Tensor | None]:
    """Return width -> (rows, bytes), and the place of each row among them where widths differ."""
    rows = packed.layout.rows
    if not isinstance(packed.bits, Tensor):
        return {packed.bits: (rows, packed.data)}, None
    codes, blocks = unpack(packed.data, packed.bits, packed.shape), {}
    for width in torch.unique(packed.bits).tolist():
        own = codes[packed.bits == width]
        blocks[width] = (len(own), pack(own, width) if width else own.new_empty(0))
    order = torch.argsort(torch.argsort(packed.bits, stable=True))
    return blocks, order.to(torch.int32)


def _explicit_zero(packed: PackedTensor) -> Tensor | None:
    """Return the grid's zero; rows of different widths have different middles, so name them."""
    grid = packed.grid
    if grid.zero is not None or not isinstance(packed.bits, Tensor):
        return grid.zero
    return torch.as_tensor(symmetric_zero(row_levels(packed.bits))).to(grid.scale.dtype)
