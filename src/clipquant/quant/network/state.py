"""What running a model changes beside its outputs, put back: buffers, attributes, modes and random states."""

from __future__ import annotations

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_LONG = 10_000  # items of a container above which only the container itself is copied, not what it holds
_FOREIGN = ("torch", "lightning", "pytorch_lightning", "numpy", "threading", "logging", "_thread", "_io")
_PLAIN = frozenset(
    (bool, int, float, complex, str, bytes, type(None), type, torch.dtype, torch.device, torch.Size)
    + (FunctionType, MethodType, BuiltinFunctionType, ModuleType)
)


@contextmanager
def kept(model: nn.Module, parameters: bool = False) -> Iterator[None]:
    """Put back at the end whatever was written to a model: nothing that was run on it leaves a trace.

    Put back are buffers, which tensor each parameter is, train and eval modes, hooks and every Python
    attribute of every submodule: tensors by value and in place, lists, dicts and sets by what they hold,
    the attributes of plain objects, random generators by their state.

    Args:
        model: Any module; its submodules are those at the beginning.
        parameters: Whether the values of the parameters are put back too, at the price of a copy of them.

    >>> model = nn.BatchNorm1d(2)
    >>> with kept(model):
    ...     model.seen = [model(torch.ones(3, 2))]
    >>> model.running_var, hasattr(model, "seen")
    (tensor([1., 1.]), False)
    """
    memo = _Memo()
    for module in model.modules():
        memo.object_(module)
    values = [(p, p.data, p.data.clone()) for p in model.parameters()] if parameters else []
    try:
        yield
    finally:
        memo.put_back()
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
        for module, index, state in devices:
            module.set_rng_state(*((state,) if index is None else (state, index)))


def _device_states() -> list[tuple[Any, int | None, Tensor]]:
    """Return the random state of each device in use."""
    found: list[tuple[Any, int | None, Tensor]] = []
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found += [(torch.cuda, i, torch.cuda.get_rng_state(i)) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        found.append((torch.mps, None, torch.mps.get_rng_state()))
    return found


class _Memo:
    """What things were like: each thing once, however often it is held."""

    def __init__(self) -> None:
        self.seen: set[int] = set()
        self.alive: list[Any] = []  # keeps what was seen alive, so that no id() is given twice
        self.undo: list[Any] = []
        self.empty: list[Any] = []  # dicts that hold nothing: most of a module's own

    def put_back(self) -> None:
        """Undo every change, the outermost things last."""
        for held in self.empty:
            if held:
                held.clear()
        with torch.no_grad():
            for step in reversed(self.undo):
                step()

    def keep_(self, value: Any) -> None:
        """Remember what a value is like now, and what it holds."""
        kind = type(value)
        if kind in _PLAIN or id(value) in self.seen or issubclass(kind, (nn.Module, type)):
            return
        self.seen.add(id(value))
        self.alive.append(value)
        if isinstance(value, Tensor):
            self._tensor_(value)
        elif isinstance(value, (list, dict, set, deque, tuple, frozenset)):
            self._container_(value)
        elif not self._generator_(value):
            self._other_(value)

    def object_(self, value: Any) -> None:
        """Remember the attributes of an object, and what they are like."""
        own, held = vars(value), dict(vars(value))

        def undo() -> None:
            own.clear()
            own.update(held)

        self.undo.append(undo)
        for item in held.values():
            kind = type(item)
            if kind in (dict, OrderedDict) and not item:
                self.empty.append(item)
            elif kind not in _PLAIN:
                self.keep_(item)

    def _tensor_(self, tensor: Tensor) -> None:
        if isinstance(tensor, nn.Parameter) or tensor.requires_grad or tensor.layout != torch.strided:
            return
        data, value = tensor.detach(), tensor.detach().clone()

        def undo() -> None:
            if tensor.is_inference() and not torch.is_inference_mode_enabled():
                with torch.inference_mode():
                    data.copy_(value)
            elif tensor.shape == value.shape and tensor.device == value.device:
                tensor.data.copy_(value)
            else:
                tensor.data = value

        self.undo.append(undo)

    def _container_(self, value: Any) -> None:
        items = list(value.items()) if isinstance(value, dict) else list(value)
        if isinstance(value, dict):
            self.undo.append(lambda: (value.clear(), value.update(items)))
        elif isinstance(value, list):
            self.undo.append(lambda: value.__setitem__(slice(None), items))
        elif isinstance(value, set):
            self.undo.append(lambda: (value.clear(), value.update(items)))
        elif isinstance(value, deque):
            self.undo.append(lambda: (value.clear(), value.extend(items)))
        if len(items) <= _LONG:
            for item in items:
                self.keep_(item[1] if isinstance(value, dict) else item)

    def _generator_(self, value: Any) -> bool:
        """Remember the state of a generator of random numbers; return whether it is one."""
        numpy = sys.modules.get("numpy")
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self.undo.append(lambda: value.set_state(state))
        elif isinstance(value, random.Random):
            drawn = value.getstate()
            self.undo.append(lambda: value.setstate(drawn))
        elif numpy and isinstance(value, numpy.random.Generator):
            bits, numbers = value.bit_generator, value.bit_generator.state
            self.undo.append(lambda: setattr(bits, "state", numbers))
        elif numpy and isinstance(value, numpy.random.RandomState):
            old = value.get_state()
            self.undo.append(lambda: value.set_state(old))
        else:
            return False
        return True

    def _other_(self, value: Any) -> None:
        numpy = sys.modules.get("numpy")
        if numpy and isinstance(value, numpy.ndarray):
            numbers = value.copy()

            def undo() -> None:
                if value.flags.writeable and value.shape == numbers.shape:
                    value[...] = numbers

            self.undo.append(undo)
        elif type(value).__module__.partition(".")[0] not in _FOREIGN:
            with suppress(TypeError):  # an object without attributes of its own
                self.object_(value)
