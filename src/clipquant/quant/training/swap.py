"""Layers that compute with fake-quantized weights: their class is swapped, their parameters and keys stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

from torch import Tensor, nn

from clipquant.errors import ArgumentTypeError
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.training.learned_grid import LearnedGrid
from clipquant.quant.training.learned_range import LearnedRange

_INPUTS = "_fake_quant_inputs"  # and the range of its inputs
_GRIDS = "_fake_quant_grids"  # attribute of a swapped layer: name of a weight -> its grid


_FED = (  # layers whose first argument is multiplied by their weight
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


def fed_weights(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return the names of the weights that multiply what their layer is called with.

    >>> model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    >>> fed_weights(model, ["0.weight", "1.weight"])
    ['1.weight']
    """
    owners = {f"{path}.weight" if path else "weight": m for path, m in model.named_modules()}
    return [name for name in names if isinstance(owners.get(name), _FED)]


def put_on(
    model: nn.Module,
    grids: Mapping[str, LearnedGrid],
    inputs: Mapping[str, LearnedRange] | None = None,
) -> None:
    """Let every layer that holds one of some weights read it fake-quantized; parameters and keys stay.

    The layer's class becomes a cached subclass on which the weight is a property; whatever reads the
    attribute, the layer's own `forward` or another's, gets the values of the grid.

    Args:
        model: The model; a tied weight is read so wherever it stands.
        grids: State-dict key of a weight -> its grid.
        inputs: State-dict key of a weight -> the range of what its layer is called with.

    Raises:
        TypeError: For a layer whose class cannot be swapped.

    >>> layer = nn.Linear(2, 1, bias=False)
    >>> put_on(layer, {})
    >>> type(layer).__name__
    'Linear'
    """
    owned = {id(parameter_at(model, name)): grid for name, grid in grids.items()}
    for path, module in model.named_modules():
        own = {
            name: owned[id(parameter)]
            for name, parameter in module._parameters.items()
            if parameter is not None and id(parameter) in owned
        }
        if own:
            _swap_(module, own, (inputs or {}).get(f"{path}.weight" if path else "weight"))


def take_off(model: nn.Module) -> None:
    """Give every layer its own class back: the inverse of `put_on`."""
    for module in model.modules():
        if _GRIDS in vars(module):
            delattr(module, _GRIDS)
            vars(module).pop(_INPUTS, None)
            module.__class__ = type(module).__mro__[1]
            if isinstance(module, nn.RNNBase):
                module._init_flat_weights()


def is_on(model: nn.Module) -> bool:
    """Return whether any layer reads fake-quantized weights."""
    return any(_GRIDS in vars(module) for module in model.modules())


def _swap_(module: nn.Module, grids: dict[str, LearnedGrid], inputs: LearnedRange | None) -> None:
    kind = type(module)
    try:
        module.__class__ = fake_quant_class(kind, tuple(sorted(grids)), inputs is not None)  # type: ignore[arg-type] # classes hash
    except TypeError as error:
        raise ArgumentTypeError(
            f"a layer's class must be open to a subclass to be trained quantized; {kind.__name__} is not ({error}). "
            f"Leave it out by exclude."
        ) from error
    object.__setattr__(module, _GRIDS, grids)
    if inputs is not None:
        object.__setattr__(module, _INPUTS, inputs)


@cache
def fake_quant_class(
    kind: type[nn.Module], names: tuple[str, ...], fed: bool = False
) -> type[nn.Module]:
    """Return the subclass of a layer's class that reads some of its weights fake-quantized; the same each time.

    Args:
        kind: The layer's class.
        names: The weights.
        fed: Whether it fake-quantizes its input too.

    >>> fake_quant_class(nn.Linear, ("weight",)).__name__
    'FakeQuantLinear'
    """
    body: dict[str, Any] = {name: property(_reader(name)) for name in names}
    if kind.__reduce_ex__ is object.__reduce_ex__ and kind.__reduce__ is object.__reduce__:
        body["__reduce_ex__"] = _reduced(kind, names, fed)
    if issubclass(kind, nn.RNNBase):
        body |= _RECURRENT
    if fed:
        body["forward"] = _fed(kind)
    return type(f"FakeQuant{kind.__name__}", (kind,), body)


def _reader(name: str) -> Any:
    def read(self: nn.Module) -> Tensor:
        parameter = self._parameters[name]
        grids: dict[str, LearnedGrid] | None = self.__dict__.get(_GRIDS)
        if parameter is None or grids is None:  # while it is being copied or taken off
            return parameter  # type: ignore[return-value]
        return grids[name].fake(parameter)

    return read


def _fed(kind: type[nn.Module]) -> Any:
    def forward(self: nn.Module, input: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: A002 - as torch names it
        inputs: LearnedRange | None = self.__dict__.get(_INPUTS)
        given = input if inputs is None else inputs.fake(input)
        return kind.forward(self, given, *args, **kwargs)

    return forward


def _reduced(kind: type[nn.Module], names: tuple[str, ...], fed: bool) -> Any:
    """Return what lets copies and pickles of a swapped layer find its class again."""

    def reduce_ex(self: nn.Module, _protocol: Any) -> tuple[Any, ...]:
        own = getattr(self, "__getstate__", None)  # of every object from Python 3.11 on
        return _new, (kind, names, fed), self.__dict__ if own is None else own()

    return reduce_ex


def _new(kind: type[nn.Module], names: tuple[str, ...], fed: bool) -> nn.Module:
    made = fake_quant_class(kind, names, fed)  # type: ignore[arg-type] # likewise
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
