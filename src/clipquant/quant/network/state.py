"""What running a model changes beside its outputs, put back: buffers, attributes, modes and random states."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 10_000  # items of a container above which it is copied, but not what it holds
_DICTS = (dict, OrderedDict)
_CONTAINERS = (list, dict, set, deque, tuple, frozenset)
_FOREIGN = frozenset(  # packages whose objects are left alone: a Trainer, a logger, a lock, a file
    ("torch", "lightning", "pytorch_lightning", "numpy", "threading", "logging", "_thread", "_io")
)
_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
    + (FunctionType, MethodType, BuiltinFunctionType, ModuleType)
)

Undo = Callable[[], object]


@contextmanager
def kept(model: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Put back at the end whatever was written to a model: what was run on it leaves no trace.

    Put back are buffers, which tensor each parameter is, train and eval modes, hooks and every Python
    attribute of every submodule: tensors by value and in place, lists, dicts and sets by what they hold,
    the attributes of plain objects, random generators by their state.

    Args:
        model: Any module.
        parameters: Whether the values of the parameters are put back too, at the price of a copy of them.

    >>> model = nn.BatchNorm1d(2)
    >>> with kept(model):
    ...     model.seen = [model(torch.ones(3, 2))]
    >>> model.running_var, hasattr(model, "seen")
    (tensor([1., 1.]), False)
    """
    things = things_of(model)
    empty = [thing for thing in things if type(thing) in _DICTS and not thing]
    undo = [step for thing in things if type(thing) not in _DICTS or thing for step in _undo(thing)]
    values = [(p, p.data, p.data.clone()) for p in model.parameters()] if parameters else []
    try:
        yield
    finally:
        for held in empty:  # most of a module's own: hooks that nobody has registered
            if held:
                held.clear()
        with torch.no_grad():
            for step in reversed(undo):
                step()
            for parameter, tensor, value in values:
                tensor.copy_(value)
                parameter.data = tensor


@contextmanager
def seeded(number: int) -> Iterator[None]:
    """Draw the same random numbers each time, by torch on every device, numpy and random; put back after.

    Args:
        number: The seed.

    >>> with seeded(1):
    ...     first = torch.rand(1)
    >>> with seeded(1):
    ...     print(torch.equal(first, torch.rand(1)))
    True
    """
    numpy = sys.modules.get("numpy")
    devices = _device_states()
    states = torch.get_rng_state(), random.getstate(), numpy and numpy.random.get_state()
    torch.manual_seed(number)
    random.seed(number)
    if numpy:
        numpy.random.seed(number % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        random.setstate(states[1])
        if numpy:
            numpy.random.set_state(states[2])
        for put_back in devices:
            put_back()


def _device_states() -> list[Undo]:
    """Return what puts back the random state of each device in use."""
    found: list[Undo] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        for index in range(torch.cuda.device_count()):
            state = torch.cuda.get_rng_state(index)
            found.append(partial(torch.cuda.set_rng_state, state, index))
    if torch.backends.mps.is_available():
        own = torch.mps.get_rng_state()
        found.append(lambda: torch.mps.set_rng_state(own))
    return found


class Trace:
    """What a model is like at one moment, to see later whether anything was written to it.

    >>> model = nn.Dropout()
    >>> trace = Trace(model)
    >>> model.calls = 1
    >>> trace.changed()
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.marks = [(thing, _mark(thing)) for thing in things_of(model)]

    def changed(self) -> bool:
        """Return whether any attribute, container or tensor was written."""
        return any(_differ(mark, _mark(thing)) for thing, mark in self.marks)


def things_of(model: nn.Module) -> list[Any]:
    """Return whatever a step may write to: modules, and what their attributes hold, each once, outermost first.

    Parameters are left out, and so are tensors that are part of a graph.
    """
    found: list[Any] = list(model.modules())
    seen = set(map(id, found))
    for thing in found:  # grows meanwhile
        if type(thing) in _DICTS and not thing:
            continue
        for item in _held(thing):
            if type(item) in _PLAIN or id(item) in seen or isinstance(item, (nn.Module, type)):
                continue
            seen.add(id(item))
            if _is_state(item):
                found.append(item)
    return found


def _held(thing: Any) -> Iterable[Any]:
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= _LONG else ()
    if isinstance(thing, _CONTAINERS):
        return thing if len(thing) <= _LONG else ()
    if _is_leaf(thing):
        return ()
    return list(vars(thing).values())


def _is_leaf(thing: Any) -> bool:
    return isinstance(thing, (Tensor, torch.Generator, random.Random)) or _is_numpy(thing)


def _is_numpy(thing: Any, *names: str) -> bool:
    """Return whether a thing is one of numpy's classes that hold state."""
    kind = type(thing)
    return kind.__module__.startswith("numpy") and kind.__name__ in (
        names or ("ndarray", "Generator", "RandomState")
    )


def _is_state(item: Any) -> bool:
    if isinstance(item, Tensor):
        return (
            not (isinstance(item, nn.Parameter) or item.requires_grad)
            and item.layout == torch.strided
        )
    if isinstance(item, _CONTAINERS) or _is_leaf(item):
        return True
    return hasattr(item, "__dict__") and type(item).__module__.partition(".")[0] not in _FOREIGN


def _undo(thing: Any) -> Iterator[Undo]:
    """Yield what puts a thing back to what it is now."""
    if isinstance(thing, Tensor):
        yield _undo_tensor(thing)
    elif isinstance(thing, dict):
        yield partial(_refill, thing, thing.update, dict(thing))
    elif isinstance(thing, set):
        yield partial(_refill, thing, thing.update, set(thing))
    elif isinstance(thing, (list, deque)):
        yield partial(_refill, thing, thing.extend, list(thing))
    elif _is_leaf(thing):
        yield _undo_numbers(thing)
    elif not isinstance(thing, (tuple, frozenset)):
        own = vars(thing)
        yield partial(_refill, own, own.update, dict(own))


def _refill(container: Any, add: Callable[[Any], object], items: Any) -> None:
    container.clear()
    add(items)


def _undo_tensor(tensor: Tensor) -> Undo:
    data, value = tensor.detach(), tensor.detach().clone()

    def undo() -> None:
        if tensor.is_inference():
            with torch.inference_mode():
                data.copy_(value)
        elif tensor.shape == value.shape and tensor.device == value.device:
            tensor.data.copy_(value)
        else:
            tensor.data = value

    return undo


def _undo_numbers(thing: Any) -> Undo:
    """Return what puts back an array, or a generator of random numbers."""
    if isinstance(thing, torch.Generator):
        state = thing.get_state()
        return lambda: thing.set_state(state)
    if isinstance(thing, random.Random):
        drawn = thing.getstate()
        return lambda: thing.setstate(drawn)
    if _is_numpy(thing, "Generator"):
        bits, numbers = thing.bit_generator, thing.bit_generator.state
        return lambda: setattr(bits, "state", numbers)
    if _is_numpy(thing, "RandomState"):
        old = thing.get_state()
        return lambda: thing.set_state(old)
    values = thing.copy()

    def undo() -> None:
        if thing.flags.writeable and thing.shape == values.shape:
            thing[...] = values

    return undo


def _mark(thing: Any) -> tuple[Any, ...]:
    """Return what changes when a thing is written to: what it holds, or a count of writes."""
    if isinstance(thing, Tensor):
        return (0 if thing.is_inference() else thing._version, thing.data_ptr())
    if isinstance(thing, dict):
        return (*thing.keys(), *thing.values())
    if isinstance(thing, _CONTAINERS):
        return tuple(thing)
    return () if _is_leaf(thing) else (*vars(thing).keys(), *vars(thing).values())


def _differ(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    return len(before) != len(after) or any(
        a is not b and not (type(a) in (int, str, bool, float) and a == b)
        for a, b in zip(before, after, strict=True)
    )
