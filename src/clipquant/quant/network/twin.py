"""A copy of a model that shares its tensors, and holds others where it is told."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, cast

from torch import Tensor, nn


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode that shares every tensor with it.

    >>> model = nn.Linear(2, 1)
    >>> twin(model).weight is model.weight, twin(model) is model
    (True, False)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        memo.update({id(t): t for t in held if isinstance(t, Tensor)})
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception:  # whatever an attribute's own copying raises
        return _skeleton(model, {}).eval()


def _skeleton(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return modules of their own that share every attribute, for a model that cannot be copied deeply."""
    if id(model) not in made:
        new = made[id(model)] = copy.copy(model)
        own = {k: v.copy() for k, v in vars(new).items() if isinstance(v, dict)}  # hooks among them
        vars(new).update(own)
        for name, child in model._modules.items():
            new._modules[name] = None if child is None else _skeleton(child, made)
    return made[id(model)]


def hold_(exact: nn.Module, other: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Let a twin of `exact` hold other parameters, each wherever `exact` holds the one of its key.

    Args:
        exact: The network that tells which places share a tensor.
        other: Its twin.
        tensors: State-dict key -> parameter, which may be part of a graph.
    """
    for name, tensor in tensors.items():
        path, _, attribute = name.rpartition(".")
        old = getattr(exact.get_submodule(path), attribute)
        for place, key in _holders(exact, old):
            other.get_submodule(place)._parameters[key] = cast(nn.Parameter, tensor)


def _holders(model: nn.Module, tensor: Tensor) -> list[tuple[str, str]]:
    """Return every place, as module path and attribute, at which a model holds a tensor."""
    return [
        (path, name)
        for path, module in model.named_modules(remove_duplicate=False)
        for name, held in module._parameters.items()
        if held is tensor
    ]
