"""What is computed from what: marks on tensors that every operation passes on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Taint(TorchDispatchMode):
    """While active, gives whatever is computed from a marked tensor its marks.

    Attributes:
        told: Marks of tensors whose values were read out, so that anything may depend on them.

    >>> import torch
    >>> first, other = torch.ones(2), torch.ones(2)
    >>> with Taint() as taint:
    ...     taint.mark_([first], 0)
    ...     taint.mark_([other], 1)
    ...     found = taint.of([(first * 2)[:1]]), taint.of([first + other]), taint.of([torch.ones(2)])
    >>> found
    ({0}, {0, 1}, set())
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.marks: dict[int, set[int]] = {}
        self.told: set[int] = set()
        self._alive: list[Tensor] = []  # keeps the place of a storage unique

    def mark_(self, tensors: Iterable[Tensor], mark: int) -> None:
        """Put a mark on some tensors."""
        for tensor in tensors:
            self._add_(tensor, {mark})

    def of(self, tensors: Iterable[Tensor]) -> set[int]:
        """Return the marks on some tensors."""
        return set().union(*(self.marks.get(_place(t), set()) for t in tensors))

    def _add_(self, tensor: Tensor, marks: set[int]) -> None:
        if marks:
            self._alive.append(tensor)
            self.marks.setdefault(_place(tensor), set()).update(marks)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = self.of(t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor))
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        for tensor in made:
            self._add_(tensor, read)
        if not made:
            written = [t for t in tree_flatten(args)[0] if isinstance(t, Tensor)]
            self.told |= read
            for tensor in written:  # an operation that returns nothing may have written
                self._add_(tensor, read)
        return result


def _place(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
