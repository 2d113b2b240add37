"""Models whose weights stay packed in memory: layers that read them from bytes when they run."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.quant.codes.pack import PackedTensor, pack_tensor
from clipquant.quant.codes.paths import submodule
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.packed.layers import blockwise_forward
from clipquant.quant.packed.weight import PackedWeight


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

    >>> from clipquant.quant.quantize import quantize_weights
    >>> from clipquant.quant.recipe import Recipe
    >>> layer = nn.Linear(8, 4)
    >>> weights = quantize_weights(layer, Recipe(bits=4))
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
    done: set[nn.Module] = set()
    for path, attributes in owners.items():
        module = submodule(model, path)
        if module in done:  # one layer under two names
            continue
        done.add(module)
        prefix = f"{path}." if path else ""
        for attribute in attributes:
            device = module._parameters.pop(attribute).device  # type: ignore[union-attr]
            weight = held[names[prefix + attribute]]
            module.add_module(f"packed_{attribute}", weight.to(_real(device)))
        if isinstance(module, nn.RNNBase):
            _forget(module)
        module.__class__ = _packed_class(type(module), tuple(attributes))  # type: ignore[arg-type]


def packed_copy(model: nn.Module, weights: QuantizedWeights) -> nn.Module:
    """Return a copy of `model` in eval mode that holds the quantized weights packed.

    Its outputs are those of the model with the dequantized weights: bit for bit from layers of up to
    2**17 weights, and from all that do not multiply, such as embeddings. A larger layer multiplies a
    block of output channels at a time, or a linear one the codes themselves; their sums are as exact as float32's, and
    differ as its do in another order.

    >>> from clipquant.quant.quantize import quantize_weights
    >>> from clipquant.quant.recipe import Recipe
    >>> layer = nn.Linear(8, 4)
    >>> packed_copy(layer, quantize_weights(layer, Recipe(bits=4)))
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
    if attributes == ("weight",) and (forward := blockwise_forward(base)) is not None:
        members["forward"] = forward
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
            _forget(self)

    return forward


def _forget(layer: nn.RNNBase) -> None:
    """Empty a recurrent layer's list of weights; places stay, for hooks that rebuild one write to it."""
    layer._flat_weights = [None] * len(layer._flat_weights_names)


def _keep(self: nn.RNNBase) -> None:
    """Stand in for what refreshes a recurrent layer's list of weights: it has none to keep."""
