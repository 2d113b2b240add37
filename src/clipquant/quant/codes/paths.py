"""What stands at a key of a state dict, whatever its modules are called."""

from __future__ import annotations

from torch import nn


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Return the module at a dotted path, also where it is called like a method of every module.

    `nn.Module.get_submodule` finds the method instead where a module is called "half" or "type".

    Args:
        model: The root.
        path: Names joined by dots; empty: the root itself.

    Raises:
        AttributeError: If there is none.

    >>> model = nn.Module()
    >>> model.add_module("layer", nn.Linear(1, 1))
    >>> submodule(model, "layer") is model.layer, submodule(model, "") is model
    (True, True)
    """
    module = model
    for name in path.split(".") if path else []:
        found = module._modules.get(name)
        if found is None:
            raise AttributeError(f"{type(model).__name__} has no module {path!r}.")
        module = found
    return module


def parameter_at(model: nn.Module, key: str) -> nn.Parameter:
    """Return the parameter at a key of the state dict.

    Raises:
        AttributeError: If there is none.
    """
    path, _, name = key.rpartition(".")
    found = submodule(model, path)._parameters.get(name)
    if found is None:
        raise AttributeError(f"{type(model).__name__} has no parameter {key!r}.")
    return found
