"""The state of a model whose weights are quantized."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clipquant.errors import ArgumentError
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize


@dataclass(frozen=True)
class QuantizedWeights:
    """A model's state: quantized weights, and every other tensor as it is.

    Args:
        tensors: State-dict key -> quantized weight.
        floats: State-dict key -> any other tensor, of any dtype.
        aliases: Key of a tied tensor -> the key under which it is held.
        left: What stays in float, and why.
        notes: State-dict key -> what the reader should know of a weight, such as a fallback.
        lookups: Keys of the quantized weights that are looked up, as those of embeddings.
        errors: State-dict key -> error of its layer's outputs as a share of their variance, where measured.
    """

    tensors: Mapping[str, QuantizedTensor]
    floats: Mapping[str, Tensor]
    aliases: Mapping[str, str]
    left: tuple[LeftInFloat, ...]
    notes: Mapping[str, str] = field(default_factory=dict)
    lookups: frozenset[str] = frozenset()
    errors: Mapping[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Tensor]:
        """Return every key of the model's state dict, the quantized weights dequantized."""
        state = {name: dequantize(tensor) for name, tensor in self.tensors.items()}
        state |= self.floats
        return state | {alias: state[name] for alias, name in self.aliases.items()}

    def following(self, statistics: Mapping[str, Tensor]) -> QuantizedWeights:
        """Return the same weights with BatchNorm statistics that follow them, named among what is left.

        Args:
            statistics: State-dict key -> new value.
        """
        why = "BatchNorm statistic, re-estimated for the quantized weights"
        left = (replace(item, why=why) if item.name in statistics else item for item in self.left)
        own = {name: value for name, value in statistics.items() if name in self.floats}
        return replace(self, floats={**self.floats, **own}, left=tuple(left))


def rest_of(
    model: nn.Module, taken: Iterable[str], aliases: Mapping[str, str]
) -> dict[str, Tensor]:
    """Return copies of the tensors of a state dict that are neither quantized nor tied."""
    taken = set(taken) | set(aliases)
    state = model.state_dict()
    rest = {n: t for n, t in state.items() if n not in taken and _has_values(t)}
    return {name: tensor.detach().clone().contiguous() for name, tensor in rest.items()}


def _has_values(value: object) -> bool:
    return isinstance(value, Tensor) and not is_lazy(value)


def check_storable(state: Mapping[str, Tensor]) -> None:
    """Raise for tensors that no file of ours can hold: sparse ones, and complex128.

    Raises:
        ArgumentError: Naming the tensors.
    """
    odd: dict[str, object] = {
        n: t.layout for n, t in state.items() if t.layout is not torch.strided
    }
    odd |= {n: t.dtype for n, t in state.items() if t.dtype is torch.complex128}
    if odd:
        named = ", ".join(f"{name} ({kind})" for name, kind in odd.items())
        raise ArgumentError(
            f"a quantized file holds dense tensors of up to 64 bits an element; got {named}. Register it with "
            "persistent=False, or keep it dense (complex64 at most)."
        )


@dataclass(frozen=True)
class LeftInFloat:
    """A tensor that stays as it was: its key, its bytes and the reason."""

    name: str
    bytes: int
    why: str
