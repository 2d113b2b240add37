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

    Layers that can use a part of it at a time ask for `blocks()` or `lookup()`.

    Its buffers are the bytes of each width in use (`codes4`), `scale`, `zero` where the grid has
    one, and where rows differ in width `order`, the place of each row among them. They keep their
    dtypes under `.half()` and the like; the dtype of the weight follows.

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
        for bits, (_, data) in blocks.items():
            self.register_buffer(f"codes{bits}", data)
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
        held = None if self.order is None else torch.argsort(self.order)
        first = 0
        for bits, count in self.rows.items():
            size = count if self.whole else max(BLOCK // self.layout.columns // 8, 1) * 8
            for start in range(0, count, size):
                stop = min(start + size, count)
                span = slice(first + start, first + stop)
                rows = span if held is None else held[span]
                yield rows, self._values(self._unpacked(bits, start, stop), rows)
            first += count

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
        columns, data = self.layout.columns, self._codes(bits)
        unit = 8 // math.gcd(8, columns * bits)  # rows that fill whole bytes
        size = unit * columns * bits // 8
        unit_index = index // unit
        if len(data) == self.rows[bits] // unit * size:
            taken = data.view(-1, size).index_select(0, unit_index) if size else data
        else:  # the last rows do not fill their unit
            places = unit_index[:, None] * size + torch.arange(size, device=index.device)
            taken = data[places.clamp_(max=len(data) - 1)]
        codes = unpack(taken.reshape(-1), bits, (len(index) * unit, columns))
        places = torch.arange(len(index), device=index.device) * unit + index % unit
        return codes if unit == 1 else codes.index_select(0, places)

    def _unpacked(self, bits: int, start: int, stop: int) -> Tensor:
        """Return the codes of rows `start` to `stop` of those of one width."""
        columns = self.layout.columns
        ends = (packed_bytes(bits, (row, columns)) for row in (start, stop))
        return unpack(self._codes(bits)[slice(*ends)], bits, (stop - start, columns))

    def _values(self, codes: Tensor, rows: slice | Tensor) -> Tensor:
        """Return the weights that the codes of some rows stand for."""
        scale = self.scale[rows] if len(self.scale) > 1 else self.scale
        zero = self.zero[rows] if self.zero is not None and len(self.zero) > 1 else self.zero
        grid = Grid(scale, zero, self.levels or 0, self.group_size)
        return dequantize_rows(codes, grid).to(self.dtype)

    def extra_repr(self) -> str:
        widths = ", ".join(f"{n} rows of {b} bits" for b, n in self.rows.items())
        return f"{self.layout.shape}, {widths}, {self.method}"

    def _codes(self, bits: int) -> Tensor:
        codes: Tensor = getattr(self, f"codes{bits}")
        return codes

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
