"""Layers that compute with fake-quantized weights: their class is swapped, their parameters and keys stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from clipquant.errors import ArgumentTypeError
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.training.learned_grid import LearnedGrid

_GRIDS = "_fake_quant_grids"  # attribute of a swapped layer: name of a weight -> its grid


def put_on(model: nn.Module, grids: Mapping[str, LearnedGrid]) -> None:
    """Let every layer that holds one of some weights read it fake-quantized; parameters and keys stay.

    The layer's class becomes a cached subclass on which the weight is a property; whatever reads the
    attribute, the layer's own `forward` or another's, gets the values of the grid.

    Args:
        model: The model; a tied weight is read so wherever it stands.
        grids: State-dict key of a weight -> its grid.

    Raises:
        TypeError: For a layer whose class cannot be swapped.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> put_on(layer, {})
    >>> type(layer).__name__
    'Linear'
    """
    owned = {id(parameter_at(model, name)): grid for name, grid in grids.items()}
    for module in model.modules():
        own = {
            name: owned[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in owned
        }
        if own:
            _swap_(module, own)


def take_off(model: nn.Module) -> None:
    """Give every layer its own class back: the inverse of `put_on`."""
    for module in model.modules():
        if _GRIDS in vars(module):
            delattr(module, _GRIDS)
            module.__class__ = type(module).__mro__[1]
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()


def is_on(model: nn.Module) -> bool:
    """Return whether any layer reads fake-quantized weights."""
    return any(_GRIDS in vars(module) for module in model.modules())


def _swap_(module: nn.Module, grids: dict[str, LearnedGrid]) -> None:
    kind = type(module)
    try:
        module.__class__ = fake_quant_class(kind, tuple(sorted(grids)))  # type: ignore[arg-type] # classes hash
    except TypeError as error:
        raise ArgumentTypeError(
            f"a layer's class must be open to a subclass to be trained quantized; {kind.__name__} is not ({error}). "
            f"Leave it out by exclude."
        ) from error
    object.__setattr__(module, _GRIDS, grids)


@cache
def fake_quant_class(kind: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the subclass of a layer's class that reads some of its weights fake-quantized; the same each time.

    >>> fake_quant_class(nn.Linear, ("weight",)).__name__
    'FakeQuantLinear'
    """
    body: dict[str, Any] = {name: property(_reader(name)) for name in names}
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        body["__reduce_ex__"] = _reduced(kind, names)
    if issubclass(kind, nn.RNNBase):
        body |= _RECURRENT
    return type(f"FakeQuant{kind.__name__}", (kind,), body)


def _reader(name: str) -> Any:
    def read(self: nn.Module) -> Tensor:
        parameter = self._parameters[name]
        grids: dict[str, LearnedGrid] | None = self.__dict__.get(_GRIDS)
        if parameter is None or grids is None:  # while it is being copied or taken off
            return parameter  # type: ignore[return-value]
        return grids[name].fake(parameter)

    return read


def _reduced(kind: type[nn.Module], names: tuple[str, ...]) -> Any:
    """Return what lets copies and pickles of a swapped layer find its class again."""

    def reduce_ex(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        own = getattr(self, "__getstate__", None)  # of every object from Python 3.11 on
        return _new, (kind, names), self.__dict__ if own is None else own()

    return reduce_ex


def _new(kind: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    made = fake_quant_class(kind, names)  # type: ignore[arg-type] # likewise
    return made.__new__(made)


def _flat_weights(self: nn.RNNBase) -> list[Tensor]:
    return [getattr(self, name) for name in self._flat_weights_names]


def _keep_flat_weights(self: nn.RNNBase, value: Iterable[Tensor]) -> None:
    """Leave the list alone that torch would keep: it is made anew each time."""


def _nothing(self: nn.RNNBase) -> None:
    """Leave memory as it is: what is read is made anew each time."""


_RECURRENT = {
    "_flat_weights": property(_flat_weights, _keep_flat_weights),
    "flatten_parameters": _nothing,
    "_update_flat_weights": _nothing,
}
