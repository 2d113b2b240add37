"""Weights that stay packed in memory: a tensor of bytes, a module that dequantizes it when asked."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.grid import Grid, dequantize_rows, symmetric_zero
from clipquant.quant.model import QuantizedWeights
from clipquant.quant.pack import pack, unpack
from clipquant.quant.spec import Layout, QuantizedTensor


@dataclass(frozen=True)
class PackedTensor:
    """A quantized weight whose codes are dense bytes; everything else as in `QuantizedTensor`.

    Args:
        data: uint8 (bytes,), as `pack` makes them.
        scale: Floating (rows or 1, groups): the step of the grid.
        zero: Like `scale`: the possibly fractional code of 0.0. None: symmetric.
        bits: Width of a code, or uint8 (rows,) where each row has its own, 0 to 8.
        levels: Steps of the grid where all rows share them; None with a bits vector.
        group_size: Neighbouring columns that share a scale.
        layout: How the matrix folds back into the weight.
        dtype: Floating dtype of the weight.
        method: Name of the method that chose the codes.
    """

    data: Tensor
    scale: Tensor
    zero: Tensor | None
    bits: int | Tensor
    levels: int | None
    group_size: int
    layout: Layout
    dtype: torch.dtype
    method: str = "rtn"

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the matrix of codes."""
        return self.layout.rows, self.layout.columns


def pack_tensor(tensor: QuantizedTensor) -> PackedTensor:
    """Return a quantized weight with its codes packed.

    >>> from clipquant.quant.ranges import quantize_weight
    >>> from clipquant.quant.spec import QuantSpec
    >>> tensor = quantize_weight(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), QuantSpec(2))
    >>> pack_tensor(tensor).data
    tensor([228], dtype=torch.uint8)
    """
    fields = {**vars(tensor)}
    return PackedTensor(pack(fields.pop("codes"), tensor.bits), **fields)


def unpack_tensor(packed: PackedTensor) -> QuantizedTensor:
    """Return a packed weight with its codes unpacked: the inverse of `pack_tensor`."""
    fields = {**vars(packed)}
    return QuantizedTensor(unpack(fields.pop("data"), packed.bits, packed.shape), **fields)


class PackedWeight(nn.Module):
    """A weight held as packed codes: `forward()` returns it dequantized, and keeps nothing.

    Its buffers are the bytes of each width in use (`codes4`), `scale`, `zero` where the grid has
    one, and where rows differ in width `order`, the place of each row among them. They keep their
    dtypes under `.half()` and the like; the dtype of the weight follows.

    Args:
        packed: The weight.

    >>> from clipquant.quant.ranges import quantize_weight
    >>> from clipquant.quant.spec import QuantSpec
    >>> tensor = quantize_weight(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), QuantSpec(2))
    >>> PackedWeight(pack_tensor(tensor))()
    tensor([[0., 1., 2., 3.]])
    """

    scale: Tensor
    zero: Tensor | None
    order: Tensor | None

    def __init__(self, packed: PackedTensor) -> None:
        super().__init__()
        self.layout, self.levels, self.group_size = packed.layout, packed.levels, packed.group_size
        self.dtype, self.method = packed.dtype, packed.method
        blocks, order = _by_width(packed)
        self.rows = {bits: rows for bits, (rows, _) in blocks.items()}
        for bits, (_, data) in blocks.items():
            self.register_buffer(f"codes{bits}", data)
        self.register_buffer("scale", packed.scale)
        self.register_buffer("zero", _explicit_zero(packed))
        self.register_buffer("order", order)

    def forward(self) -> Tensor:
        """Return the weight in its shape and dtype."""
        columns = self.layout.columns
        blocks = [unpack(self._codes(b), b, (n, columns)) for b, n in self.rows.items()]
        codes = blocks[0] if self.order is None else torch.cat(blocks)[self.order]
        grid = Grid(self.scale, self.zero, self.levels or 0, self.group_size)
        weight = self.layout.unfold(dequantize_rows(codes, grid))
        return weight.to(self.dtype).contiguous()

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


def pack_modules_(
    model: nn.Module, tensors: Mapping[str, PackedTensor], aliases: Mapping[str, str]
) -> None:
    """Give `model`'s weights over to packed codes, dequantized whenever a layer reads its weight.

    A layer keeps its class (as a subclass), its name and its other parameters; its weight becomes
    read-only, and tied layers share one `PackedWeight`.

    Args:
        model: Any module; changed in place.
        tensors: State-dict key -> packed weight.
        aliases: Key of a tied tensor -> the key under which it is held.

    >>> from clipquant.quant.model import quantize_weights
    >>> layer = nn.Linear(8, 4)
    >>> weights = quantize_weights(layer, bits=4)
    >>> pack_modules_(layer, {"weight": pack_tensor(weights.tensors["weight"])}, {})
    >>> list(layer.state_dict())
    ['bias', 'packed_weight.codes4', 'packed_weight.scale', 'packed_weight.zero']
    >>> layer.weight.shape
    torch.Size([4, 8])
    """
    held = {name: PackedWeight(tensor) for name, tensor in tensors.items()}
    names = {name: name for name in held} | {a: n for a, n in aliases.items() if n in held}
    owners: dict[str, list[str]] = {}
    for key in names:
        path, _, attribute = key.rpartition(".")
        owners.setdefault(path, []).append(attribute)
    for path, attributes in owners.items():
        module = model.get_submodule(path)
        prefix = f"{path}." if path else ""
        for attribute in attributes:
            device = module._parameters.pop(attribute).device  # type: ignore[union-attr]
            weight = held[names[prefix + attribute]]
            module.add_module(f"packed_{attribute}", weight.to(_real(device)))
        if isinstance(module, nn.RNNBase):
            module._flat_weights = []
        module.__class__ = _packed_class(type(module), tuple(attributes))  # type: ignore[arg-type]


def packed_copy(model: nn.Module, weights: QuantizedWeights) -> nn.Module:
    """Return a copy of `model` in eval mode that holds the quantized weights packed.

    Its outputs are those of the model with the dequantized weights, bit for bit.

    >>> from clipquant.quant.model import quantize_weights
    >>> layer = nn.Linear(8, 4)
    >>> packed_copy(layer, quantize_weights(layer, bits=4))
    PackedLinear(
      in_features=8, out_features=4, bias=True
      (packed_weight): PackedWeight((4, 8), 4 rows of 4 bits, mse)
    )
    """
    copied = copy.deepcopy(model).eval()
    copied.load_state_dict(dict(weights.floats), strict=False)
    packed = {name: pack_tensor(tensor) for name, tensor in weights.tensors.items()}
    pack_modules_(copied, packed, weights.aliases)
    return copied


def _real(device: torch.device) -> torch.device:
    return torch.device("cpu") if device.type == "meta" else device


@functools.cache
def _packed_class(base: type, attributes: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `base` whose `attributes` are read from its packed weights."""

    def reduce(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        get_state = getattr(self, "__getstate__", None)
        state = get_state() if get_state else self.__dict__.copy()
        return _new, (base, attributes), state

    members: dict[str, Any] = {name: _reader(name) for name in attributes}
    members["__reduce_ex__"] = reduce  # the class has no name by which pickle could find it
    if issubclass(base, nn.RNNBase):
        members |= {"_init_flat_weights": _keep, "_update_flat_weights": _keep}
        members["forward"] = _runner(base)
    return type(f"Packed{base.__name__}", (base,), members)


def _new(base: type[nn.Module], attributes: tuple[str, ...]) -> nn.Module:
    cls = _packed_class(base, attributes)  # type: ignore[arg-type]
    return cls.__new__(cls)


def _reader(name: str) -> property:
    def read(self: nn.Module) -> Tensor:
        weight: Tensor = self._modules[f"packed_{name}"]()  # type: ignore[misc]
        return weight

    return property(read)


def _runner(base: type[nn.RNNBase]) -> Callable[..., Any]:
    """Return a forward that holds a recurrent layer's dequantized weights for one call."""

    def forward(self: nn.RNNBase, *args: Any, **kwargs: Any) -> Any:
        self._flat_weights = [getattr(self, name, None) for name in self._flat_weights_names]
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self._flat_weights = []

    return forward


def _keep(self: nn.RNNBase) -> None:
    """Stand in for what refreshes a recurrent layer's list of weights: it has none to keep."""


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
    if packed.zero is not None or not isinstance(packed.bits, Tensor):
        return packed.zero
    levels = 2 ** packed.bits.to(torch.int64) - 1
    zero = torch.as_tensor(symmetric_zero(levels)).to(packed.scale.dtype)
    return zero.unsqueeze(1)
