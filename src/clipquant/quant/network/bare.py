"""A module as its author wrote it: without what compilers and engines have put around its parts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, ParamSpec, TypeVar

from torch import Tensor, nn

P = ParamSpec("P")
T = TypeVar("T")

# What `torch.compile`, FSDP and activation checkpointing call the module that they stand in front of.
WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_ENGINES = ("torch.distributed.", "deepspeed.")


def inner_of(module: nn.Module) -> nn.Module:
    """Return the module that compilers and engines have wrapped; one that is not wrapped is itself.

    >>> import torch
    >>> layer = nn.Linear(1, 1)
    >>> inner_of(torch.compile(layer)) is layer, inner_of(layer) is layer
    (True, True)
    """
    while type(module).__module__.startswith("torch."):
        held = _plain(module._modules)
        inner = next((i for name in WRAPPED if (i := held.get(name)) is not None), None)
        if inner is None:
            break
        module = inner
    return module


def bare_key(key: str) -> str:
    """Return a state-dict key without the names of wrappers.

    >>> bare_key("net._orig_mod.0.weight")
    'net.0.weight'
    """
    return ".".join(part for part in key.split(".") if part not in WRAPPED)


@contextmanager
def bare(module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Iterator[None]:
    """Take wrappers, an engine's classes and its hooks off the parts of a module for a while.

    Meanwhile its keys are those that its author gave, it runs without an engine, and it can be copied.
    Everything is put back at the end, the same objects in the same places.

    Args:
        module: Any module, itself not wrapped: see `inner_of`.
        tensors: Key -> a tensor that takes the place of the parameter or buffer there, wherever it is
            held, such as the whole of one of which this process has a part.

    >>> import torch
    >>> model = nn.Sequential(torch.compile(nn.Linear(1, 1)))
    >>> with bare(model):
    ...     print(list(model.state_dict()))
    ['0.weight', '0.bias']
    >>> list(model.state_dict())
    ['0._orig_mod.weight', '0._orig_mod.bias']
    """
    undo: list[Callable[[], object]] = []
    try:
        for part in _unwrapped(module, undo):
            _without_engine_(part, undo)
        if tensors:
            _hold_(module, tensors, undo)
        yield
    finally:
        for step in reversed(undo):
            step()


def on_bare(work: Callable[P, T]) -> Callable[P, T]:
    """Return a function of a module, its first argument, that sees it as its author wrote it."""

    @functools.wraps(work)
    def on_inner(*args: P.args, **named: P.kwargs) -> T:
        model = args[0] if args else named.get("model")
        if not isinstance(model, nn.Module):
            return work(*args, **named)  # which says what is wrong with it
        inner: Any = inner_of(model)
        given: Any = ((inner, *args[1:]), named) if args else ((), {**named, "model": inner})
        with bare(inner):
            return work(*given[0], **given[1])

    return on_inner


def _unwrapped(module: nn.Module, undo: list[Callable[[], object]]) -> list[nn.Module]:
    """Return all parts of a module, each wrapper among them replaced by what it wraps."""
    parts = [module]
    seen = {id(module)}
    for part in parts:  # grows meanwhile
        for name, child in _plain(part._modules).items():
            inner = child if child is None else inner_of(child)
            if inner is not child:
                undo.append(partial(part._modules.__setitem__, name, child))
                part._modules[name] = inner
            if inner is not None and id(inner) not in seen:
                seen.add(id(inner))
                parts.append(inner)
    return parts


def _plain(held: Any) -> dict[str, Any]:
    """Return what a module holds; nothing for a compiled script, which keeps it to itself."""
    return held if isinstance(held, dict) else {}


def _without_engine_(part: nn.Module, undo: list[Callable[[], object]]) -> None:
    """Give a part its own class, and leave only hooks that are not an engine's."""
    plain = next(kind for kind in type(part).__mro__ if not _is_engines(kind.__module__))
    if plain is not type(part):
        undo.append(partial(setattr, part, "__class__", type(part)))
        part.__class__ = plain
    for name, hooks in vars(part).items():
        if not name.endswith("_hooks") or not isinstance(hooks, dict):
            continue
        left = {k: hook for k, hook in hooks.items() if not _is_engines_hook(hook)}
        if len(left) < len(hooks):
            undo.append(partial(_refill_, hooks, dict(hooks)))
            _refill_(hooks, left)


def _is_engines(name: str | None) -> bool:
    return f"{name}.".startswith(_ENGINES)


def _is_engines_hook(hook: Any) -> bool:
    if type(hook).__name__ == "_WrappedHook":
        hook = hook.hook
    if isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    own = owner is not None and _is_engines(type(owner).__module__)
    return own or _is_engines(getattr(hook, "__module__", None))


def _refill_(held: dict[Any, Any], items: Mapping[Any, Any]) -> None:
    held.clear()
    held.update(items)


def _hold_(
    module: nn.Module, tensors: Mapping[str, Tensor], undo: list[Callable[[], object]]
) -> None:
    """Put tensors in the places of those under their keys, tied ones in all of theirs."""
    named: dict[str, Tensor] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    new: dict[int, Tensor] = {}
    for key, value in tensors.items():
        old = named[key]
        if isinstance(old, nn.Parameter):
            value = nn.Parameter(value, old.requires_grad)
        new[id(old)] = value
    for part in module.modules():
        for held in map(_plain, (part._parameters, part._buffers)):
            for name, own in list(held.items()):
                if id(own) in new:
                    undo.append(partial(held.__setitem__, name, own))
                    held[name] = new[id(own)]
