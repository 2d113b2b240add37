"""What a network decides on the way, such as the symbol that a decoder reads next: taken once, followed again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_ATEN = torch.ops.aten
_CHOICES = {_ATEN.argmax, _ATEN.argmin, _ATEN.argsort, _ATEN.multinomial, _ATEN.bernoulli}
_PAIRS = {
    _ATEN.max.dim: 1,
    _ATEN.min.dim: 1,
    _ATEN.topk: 2,
    _ATEN.sort: 1,
}  # place of `dim` among the arguments


class Decisions:
    """The choices of one pass, in their order, for another pass to make as well.

    A decoder that reads its own output, or a router between experts, goes another way as soon as its
    weights are rounded; then the inputs of its layers belong to other symbols and cannot be compared
    with the float network's. Following the choices of the float pass keeps both on the same way.

    >>> taken, scores = Decisions(), torch.tensor([1.0, 3.0, 2.0])
    >>> with taken.recorded():
    ...     first = scores.argmax()
    >>> with taken.followed():
    ...     again = (-scores).argmax()
    >>> int(first), int(again)
    (1, 1)
    """

    def __init__(self) -> None:
        self._made: list[tuple[Any, Tensor]] = []

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Note every choice that is made."""
        self._made.clear()
        with _Recorder(self._made):
            yield

    @contextmanager
    def followed(self) -> Iterator[None]:
        """Put the choices noted in place of those that are made, as long as they are of a kind and shape."""
        with _Follower(self._made) if self._made else _nothing():
            yield


@contextmanager
def _nothing() -> Iterator[None]:
    yield


class _Recorder(TorchDispatchMode):
    def __init__(self, made: list[tuple[Any, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made = made

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _decides(func, args):
            choice = result if isinstance(result, Tensor) else result[1]
            self.made.append((func, choice.detach().clone()))
        return result


class _Follower(TorchDispatchMode):
    def __init__(self, made: list[tuple[Any, Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.left = iter(made)
        self.lost = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.lost or not _decides(func, args):
            return result
        own = result if isinstance(result, Tensor) else result[1]
        kind, choice = next(self.left, (None, own))
        if kind is not func or choice.shape != own.shape:
            self.lost = True  # another way altogether: from here on it is its own
            return result
        if isinstance(result, Tensor):
            return choice.clone()
        return _at(args[0], choice, _dim(func, args, kwargs or {})), choice.clone()


def _decides(func: Any, args: Any) -> bool:
    """Return whether an operation makes a choice by floating numbers."""
    kinds = (func, getattr(func, "overloadpacket", None))
    known = any(kind in _CHOICES or kind in _PAIRS for kind in kinds)
    return known and isinstance(args[0], Tensor) and args[0].is_floating_point()


def _dim(func: Any, args: Any, kwargs: Any) -> int:
    place = _PAIRS.get(func) or _PAIRS[func.overloadpacket]
    if "dim" in kwargs:
        return int(kwargs["dim"])
    if "stable" in kwargs:  # the overload that takes it by name alone
        return -1
    return int(args[place]) if len(args) > place else -1


def _at(source: Tensor, choice: Tensor, dim: int) -> Tensor:
    """Return the numbers that stand where a choice along `dim` points."""
    if choice.dim() < source.dim():
        return source.gather(dim, choice.unsqueeze(dim)).squeeze(dim)
    return source.gather(dim, choice)
