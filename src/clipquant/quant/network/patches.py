"""What a weight's rows are multiplied with: a module call's inputs as (groups, positions, columns)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from clipquant.errors import ArgumentTypeError
from clipquant.quant.network.layers import Target

Call: TypeAlias = tuple[tuple[Any, ...], dict[str, Any], Any]  # args, kwargs and output of a module
Reader: TypeAlias = Callable[[Call], Tensor]

_PAIRS = 1 << 12  # of a bilinear layer's inputs, whose second moments are held
CHUNK = 1 << 23  # elements of unfolded patches held at a time

_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_QUERY, _KEY, _VALUE = range(3)


def reader_of(target: Target) -> Reader | str:
    """Return how to read the inputs of a weight from a call of its module, or why that cannot be done.

    The reader gives the tensor that stands before the weight: for convolutions still an image, which
    `patches` turns into rows.
    """
    module, name = target.module, target.attribute
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "a lookup multiplies with nothing: every row counts by itself"
    if target.layout.stacked:
        return "a stack of experts: what each of them meets never leaves the module"
    if isinstance(module, nn.Bilinear):
        most = target.layout.columns <= _PAIRS
        return _pairs if most else f"a bilinear layer of more than {_PAIRS} pairs of inputs"
    if isinstance(module, nn.MultiheadAttention):
        return partial(_attention_input, name)
    if isinstance(module, (nn.LSTM, nn.GRU, nn.RNN)):
        return _recurrent_reader(module, name)
    if isinstance(module, (nn.LSTMCell, nn.GRUCell, nn.RNNCell)):
        return partial(_cell_input, name.startswith("weight_hh"))
    return _first


def _pairs(call: Call) -> Tensor:
    """Return the products of each pair of inputs, which a bilinear layer's weight is multiplied with."""
    args, kwargs, _ = call
    one, other = (_tensor(v) for v in (*args, *kwargs.values()))
    return (one.unsqueeze(-1) * other.unsqueeze(-2)).flatten(-2)


def _first(call: Call) -> Tensor:
    args, kwargs, _ = call
    value = args[0] if args else next(iter(kwargs.values()))
    return _tensor(value)


def _tensor(value: Any) -> Tensor:
    if isinstance(value, PackedSequence):
        value = value.data
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(
            f"expected a tensor as the layer's input; got {type(value).__name__}"
        )
    return value


def _attention_input(name: str, call: Call) -> Tensor:
    args, kwargs, _ = call
    q, k, v = (
        args[i] if i < len(args) else kwargs[key] for i, key in enumerate(("query", "key", "value"))
    )
    if name == "in_proj_weight":
        same = q is k and k is v
        return _tensor(q)[None] if same else _ragged(q, k, v)
    return _tensor({"q_proj_weight": q, "k_proj_weight": k, "v_proj_weight": v}[name])


def _ragged(*inputs: Tensor) -> Tensor:
    """Return inputs of different lengths stacked, the shorter filled with zeros."""
    flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
    longest = max(len(x) for x in flat)
    return torch.stack([F.pad(x, (0, 0, 0, longest - len(x))) for x in flat])


def _recurrent_reader(module: nn.RNNBase, name: str) -> Reader | str:
    backward = name.endswith("_reverse")
    kind, layer = name.removesuffix("_reverse").rsplit("_l", 1)
    if kind == "weight_ih" and layer == "0":
        return _first
    if kind == "weight_hh" and int(layer) == module.num_layers - 1:
        return partial(_recurrent_state, backward)
    return "an inner layer of a stacked recurrent module: its inputs never leave the module"


def _recurrent_state(backward: bool, call: Call) -> Tensor:
    """Return the states that a recurrent layer put out, which are those it took in one step later."""
    states = _tensor(call[2][0])
    half = states.shape[-1] // 2
    hidden = call[2][1]
    width = (hidden[0] if isinstance(hidden, tuple) else hidden).shape[-1]
    if states.shape[-1] == width:
        return states
    return states[..., half:] if backward else states[..., :half]


def _cell_input(hidden: bool, call: Call) -> Tensor:
    args, kwargs, output = call
    if not hidden:
        return _first(call)
    state = args[1] if len(args) > 1 else kwargs.get("hx")
    if state is None:
        state = torch.zeros_like(output[0] if isinstance(output, tuple) else output)
    return _tensor(state[0] if isinstance(state, tuple) else state)


def heads_output(attention: nn.MultiheadAttention, call: Call) -> Tensor:
    """Return the inputs of an attention's output projection, which is no call of its own."""
    args, kwargs, _ = call
    projection = attention.out_proj
    plain = nn.Linear(attention.embed_dim, attention.embed_dim, bias=False, device="meta")
    weight = projection.weight
    eye = torch.eye(attention.embed_dim, dtype=weight.dtype, device=weight.device)
    plain.weight = nn.Parameter(eye)
    attention._modules["out_proj"] = plain
    try:
        return _tensor(attention.forward(*args, **kwargs)[0])
    finally:
        attention._modules["out_proj"] = projection


def patches(target: Target, value: Tensor) -> Iterator[Tensor]:
    """Yield the rows of inputs that a weight's rows are multiplied with, a bounded chunk at a time.

    Args:
        target: The weight.
        value: What its reader gave.

    Yields:
        Float (groups, positions, columns), columns as in the target's layout: the weight's rows fall
        evenly into the groups, and `y[g] = W[g] x[g]` for every position.

    >>> layer = nn.Conv2d(1, 2, 2)
    >>> from clipquant.quant.codes.layout import Layout
    >>> target = Target("weight", layer, "weight", Layout((2, 1, 2, 2)))
    >>> [x.shape for x in patches(target, torch.ones(3, 1, 4, 4))]
    [torch.Size([1, 27, 4])]
    """
    module = target.module
    columns = target.layout.columns
    value = value.detach()
    if not isinstance(module, (*_CONV, *_TRANSPOSED)):
        groups = value.shape[0] if target.attribute == "in_proj_weight" else 1
        yield value.reshape(groups, -1, columns).float()
        return
    spatial = len(module.kernel_size)
    if value.dim() == spatial + 1:
        value = value[None]
    grow = columns * module.groups * max(value[0, 0].numel(), 1)
    for part in value.split(max(CHUNK // grow, 1)):
        image = _stretch(module, part) if isinstance(module, _TRANSPOSED) else _pad(module, part)
        stride = (1,) * spatial if isinstance(module, _TRANSPOSED) else module.stride
        flip = isinstance(module, _TRANSPOSED)
        yield _unfold(image, module.kernel_size, stride, module.dilation, module.groups, flip)


def positions_of(target: Target, value: Tensor) -> int:
    """Return how many positions `patches` yields in all.

    >>> from clipquant.quant.codes.layout import Layout
    >>> target = Target("weight", nn.Conv2d(1, 2, 2, stride=2), "weight", Layout((2, 1, 2, 2)))
    >>> positions_of(target, torch.ones(3, 1, 4, 6))
    18
    """
    module = target.module
    if not isinstance(module, (*_CONV, *_TRANSPOSED)):
        groups = value.shape[0] if target.attribute == "in_proj_weight" else 1
        return value.numel() // max(groups * target.layout.columns, 1)
    kernel: tuple[int, ...] = module.kernel_size
    samples = 1 if value.dim() == len(kernel) + 1 else value.shape[0]
    return samples * math.prod(
        _places(module, d, size) for d, size in enumerate(value.shape[-len(kernel) :])
    )


def _places(module: Any, d: int, size: int) -> int:
    """Return the positions along one axis at which a convolution puts out something."""
    reach = module.dilation[d] * (module.kernel_size[d] - 1) + 1
    if isinstance(module, _TRANSPOSED):
        padding: Any = module.padding  # of these never a word
        pads = 2 * padding[d] - module.output_padding[d]
        return int((size - 1) * module.stride[d] + reach - pads)
    pads = sum(module._reversed_padding_repeated_twice[::-1][2 * d : 2 * d + 2])
    return int((size + pads - reach) // module.stride[d] + 1)


def _pad(module: Any, x: Tensor) -> Tensor:
    pads = list(module._reversed_padding_repeated_twice)
    mode = str(module.padding_mode)
    return F.pad(x.float(), pads, "constant" if mode == "zeros" else mode)


def _stretch(module: Any, x: Tensor) -> Tensor:
    """Return the image on which a transposed convolution is a plain one with a flipped kernel."""
    out = x.float()
    pads: list[int] = []
    kernel: tuple[int, ...] = module.kernel_size
    for d in range(len(kernel)):
        stride, axis = module.stride[d], d + 2
        if stride > 1:
            wide = out.new_zeros(
                *out.shape[:axis], (out.shape[axis] - 1) * stride + 1, *out.shape[axis + 1 :]
            )
            wide[(slice(None),) * axis + (slice(None, None, stride),)] = out
            out = wide
        edge = module.dilation[d] * (kernel[d] - 1) - module.padding[d]
        pads = [edge, edge + module.output_padding[d], *pads]
    return F.pad(out, pads)


def _unfold(
    x: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    groups: int,
    flip: bool,
) -> Tensor:
    spatial = len(kernel)
    for d in range(spatial):
        x = x.unfold(2 + d, dilation[d] * (kernel[d] - 1) + 1, stride[d])[..., :: dilation[d]]
    if flip:
        x = x.flip(tuple(range(2 + spatial, 2 + 2 * spatial)))
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    places = tuple(range(3, 3 + spatial))
    taps = tuple(range(3 + spatial, 3 + 2 * spatial))
    x = x.permute(1, 0, *places, 2, *taps)
    size = x.shape[1 + 1 + spatial :].numel()
    return x.reshape(groups, -1, size)
