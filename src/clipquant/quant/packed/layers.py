"""Forward passes that dequantize a bounded part of a packed weight at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipquant.quant.packed.products import multiplies, product
from clipquant.quant.packed.weight import PackedWeight


def blockwise_forward(base: type) -> Callable[..., Tensor] | None:
    """Return a forward for a layer of class `base` whose weight is packed; None: it keeps its own.

    A subclass with a forward of its own keeps it, and reads the whole weight.

    >>> blockwise_forward(nn.Linear) is linear, blockwise_forward(nn.LSTM)
    (True, None)
    """
    for kind, forward in _FORWARDS.items():
        own = ("forward", "_conv_forward")
        if issubclass(base, kind) and all(_same(base, kind, name) for name in own):
            return forward
    return None


def _same(base: type, kind: type, name: str) -> bool:
    return getattr(base, name, None) is getattr(kind, name, None)


def linear(self: nn.Linear, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for it
    """Return `F.linear` with a packed weight, a block of output features at a time."""
    weight = _packed(self)
    if multiplies(weight, input):
        out = product(input, weight)
        return out if self.bias is None else out + self.bias

    def block(rows: Any, part: Tensor) -> Tensor:
        return F.linear(input, part, _part(self.bias, rows))

    return _joined(weight, block, dim=-1)


def convolution(self: Any, input: Tensor) -> Tensor:  # noqa: A002
    """Return a convolution with a packed weight, a block of output channels at a time."""
    weight = _packed(self)
    if weight.whole or self.groups > 1:
        out: Tensor = self._conv_forward(input, weight(), self.bias)
        return out

    def block(rows: Any, part: Tensor) -> Tensor:
        kernel = part.reshape(-1, *weight.layout.shape[1:])
        out: Tensor = self._conv_forward(input, kernel, _part(self.bias, rows))
        return out

    return _joined(weight, block, dim=-1 - len(self.kernel_size))


def transposed(
    self: Any,
    input: Tensor,  # noqa: A002
    output_size: list[int] | None = None,
) -> Tensor:
    """Return a transposed convolution with a packed weight, a block of output channels at a time."""
    spatial = len(self.kernel_size)
    padding = self._output_padding(
        input, output_size, self.stride, self.padding, self.kernel_size, spatial, self.dilation
    )
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    weight = _packed(self)
    shape = weight.layout.shape

    def block(rows: Any, part: Tensor) -> Tensor:
        kernel = part.reshape(-1, shape[0], *shape[2:]).transpose(0, 1)
        bias = _part(self.bias, rows)
        return run(input, kernel, bias, self.stride, self.padding, padding, 1, self.dilation)

    if weight.whole or self.groups > 1:
        return run(
            input, weight(), self.bias, self.stride, self.padding, padding, self.groups, self.dilation
        )  # fmt: skip
    return _joined(weight, block, dim=-1 - spatial)


def embedding(self: nn.Embedding, input: Tensor) -> Tensor:  # noqa: A002
    """Return rows of a packed table, of which no other is dequantized."""
    table = _packed(self)
    if table.whole:
        return F.embedding(
            input, table(), self.padding_idx, self.max_norm, self.norm_type,
            self.scale_grad_by_freq, self.sparse,
        )  # fmt: skip
    rows = table.lookup(input.reshape(-1))
    if self.max_norm is not None:
        each = torch.arange(len(rows), device=rows.device)
        rows = F.embedding(each, rows, None, self.max_norm, self.norm_type)
    return rows.reshape(*input.shape, rows.shape[1])


def embedding_bag(
    self: nn.EmbeddingBag,
    input: Tensor,  # noqa: A002
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Return reduced rows of a packed table, of which no other is dequantized."""
    table, padding = _packed(self), self.padding_idx
    if table.whole:
        rows, index = table(), input
    else:
        used, index = torch.unique(input, return_inverse=True)
        rows = table.lookup(used)
        found = [] if padding is None else (used == padding).nonzero().flatten().tolist()
        padding = found[0] if found else None
    return F.embedding_bag(
        index, rows, offsets, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.mode,
        self.sparse, per_sample_weights, self.include_last_offset, padding,
    )  # fmt: skip


def _joined(weight: PackedWeight, run: Callable[[Any, Tensor], Tensor], dim: int) -> Tensor:
    """Return the outputs of all rows, those of a block written to their places along `dim`."""
    out: Tensor | None = None
    for rows, part in weight.blocks():
        own = run(rows, part)
        if len(part) == weight.layout.rows and isinstance(rows, slice):
            return own
        if out is None:  # before the next block's temporaries, so that these leave no gaps behind
            shape = list(own.shape)
            shape[dim] = weight.layout.rows
            out = own.new_empty(shape)
        out[(..., rows, *[slice(None)] * (-1 - dim))] = own
    assert out is not None  # noqa: S101 - a weight has rows
    return out


def _packed(layer: nn.Module) -> PackedWeight:
    held = layer._modules["packed_weight"]
    assert isinstance(held, PackedWeight)  # noqa: S101 - what makes a layer a packed one
    return held


def _part(bias: Tensor | None, rows: Any) -> Tensor | None:
    return None if bias is None else bias[rows]


_FORWARDS: dict[type, Callable[..., Tensor]] = {
    nn.Linear: linear,
    nn.Conv1d: convolution,
    nn.Conv2d: convolution,
    nn.Conv3d: convolution,
    nn.ConvTranspose1d: transposed,
    nn.ConvTranspose2d: transposed,
    nn.ConvTranspose3d: transposed,
    nn.Embedding: embedding,
    nn.EmbeddingBag: embedding_bag,
}
