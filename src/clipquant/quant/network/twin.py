"""Other weights for a model: in force while it runs, put back afterwards; and a copy that shares its tensors."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from clipquant.quant.codes.paths import submodule


class Twin:
    """A model as it runs with other values for some of its parameters and buffers.

    The model itself is run, so that whatever is bound to it (hooks, closures, compiled parts) sees the
    other values too; outside of `worn` it holds its own.

    Args:
        model: The model.

    >>> layer = nn.Linear(1, 1, bias=False)
    >>> twin = Twin(layer)
    >>> twin.hold_({"weight": torch.tensor([[2.0]])})
    >>> twin.run(lambda model, x: model(x), torch.ones(1, 1)).item(), layer.weight is twin.model.weight
    (2.0, True)
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}

    def hold_(self, tensors: Mapping[str, Tensor]) -> None:
        """Hold some tensors, each wherever the model holds the one of its key.

        Args:
            tensors: State-dict key -> value, which may be part of a graph.
        """
        for name in tensors:
            if name not in self._places:
                self._places[name] = _places(self.model, name)
        self.tensors.update(tensors)

    def drop_(self, names: list[str]) -> None:
        """Hold the model's own tensors under these keys again."""
        for name in names:
            self.tensors.pop(name, None)

    @contextmanager
    def worn(self) -> Iterator[nn.Module]:
        """Let the model hold the twin's tensors for a while."""
        undo: list[tuple[dict[str, Any], str, Any] | tuple[Tensor, Tensor]] = []
        try:
            for name, value in self.tensors.items():
                for module, key in self._places[name]:
                    undo.append(_swap_(module, key, value))
            yield self.model
        finally:
            for entry in reversed(undo):
                if len(entry) == 2:
                    entry[0].data = entry[1]
                else:
                    entry[0][entry[1]] = entry[2]

    def run(self, forward: Any, batch: Any) -> Any:
        """Return what the model gives for a batch with the twin's tensors."""
        with self.worn() as model:
            return forward(model, batch)


def _swap_(module: nn.Module, key: str, value: Tensor) -> Any:
    """Put a value in a tensor's place, and return what undoes it.

    A value without a graph goes into the parameter itself, which may be known elsewhere; one with a
    graph, or of another kind, takes the parameter's place in its module.
    """
    held = module._parameters if key in module._parameters else module._buffers
    old = held[key]
    if old is not None and value.device != old.device:  # a loop may have moved the model meanwhile
        value = value.to(old.device)
    if isinstance(old, nn.Parameter) and _fits(old, value):
        kept, old.data = old.data, value.detach()
        return old, kept
    held[key] = value  # type: ignore[assignment]
    return held, key, old


def _fits(old: Tensor, value: Tensor) -> bool:
    alike = (old.dtype, old.device) == (value.dtype, value.device)
    return alike and not value.requires_grad and not old.is_inference()


def _places(model: nn.Module, name: str) -> list[tuple[nn.Module, str]]:
    """Return every module and attribute at which a model holds the tensor of a key."""
    path, _, attribute = name.rpartition(".")
    owner = submodule(model, path)
    if attribute in owner._buffers:
        return [(owner, attribute)]
    tensor = owner._parameters[attribute]
    return [
        (module, key)
        for module in model.modules()
        for key, own in module._parameters.items()
        if own is tensor
    ]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode for a while, and every part of it back in its own."""
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def twin_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode, with parameters and buffers of its own that share storage.

    >>> model = nn.Linear(2, 1)
    >>> copied = twin_of(model)
    >>> copied.weight is model.weight, copied.weight.data_ptr() == model.weight.data_ptr()
    (False, True)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *vars(module).values()]
        memo.update({id(t): _alias(t) for t in held if isinstance(t, Tensor)})
        if getattr(module, "max_norm", None) is not None:  # an embedding that writes its weight
            memo.pop(id(module._parameters.get("weight")), None)
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception:  # whatever an attribute's own copying raises
        return _skeleton(model, {}, memo).eval()


def _alias(tensor: Tensor) -> Tensor:
    tensor = tensor if not tensor.is_inference() else _outside(tensor)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.detach(), tensor.requires_grad)
    return tensor


def _outside(tensor: Tensor) -> Tensor:
    """Return a copy of a tensor made under inference_mode that is not bound to it."""
    copied = tensor.detach().clone()
    return nn.Parameter(copied, False) if isinstance(tensor, nn.Parameter) else copied


def _skeleton(model: nn.Module, made: dict[int, nn.Module], memo: dict[int, Any]) -> nn.Module:
    """Return modules of their own that share every attribute, for a model that cannot be copied deeply."""
    if id(model) not in made:
        new = made[id(model)] = copy.copy(model)
        own = {k: v.copy() for k, v in vars(new).items() if isinstance(v, dict)}  # hooks among them
        vars(new).update(own)
        for key, parameter in model._parameters.items():
            new._parameters[key] = memo.get(id(parameter), parameter)
        for key, buffer in model._buffers.items():
            new._buffers[key] = None if buffer is None else buffer.clone()
        for name, child in model._modules.items():
            new._modules[name] = None if child is None else _skeleton(child, made, memo)
    return made[id(model)]
