"""Norms that cost a pass over memory, which is made when somebody reads them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from clipquant.clip.measured import Measured
from clipquant.clip.norms import combine_norms, value_norms


class Later(Measured):
    """Norms of gradients as they are now, measured when they are read first: as long as they are there, unchanged.

    The gradients are not kept alive for it.

    Args:
        tensors: Dense gradients.
        order: Order of the norms.

    Example:
        >>> gradient = torch.tensor([3.0, 4.0])
        >>> norms, lost = Later([gradient]), Later([gradient])
        >>> norms.total
        5.0
        >>> gradient = gradient.zero_()
        >>> norms.total, lost.known
        (5.0, False)
    """

    def __init__(self, tensors: Sequence[Tensor], order: float = 2.0) -> None:
        super().__init__(torch.zeros(0, device="cpu"), order)
        self._found = [(TensorWeakRef(tensor), tensor._version) for tensor in tensors]

    @property
    def known(self) -> bool:
        """Whether the norms are measured or can be: no gradient is gone or has changed."""
        if "each" in vars(self):
            return True
        tensors = [(reference(), version) for reference, version in self._found]
        return bool(tensors) and all(t is not None and t._version == v for t, v in tensors)

    @cached_property
    def each(self) -> Tensor:
        """Norm of each gradient, shape (number of gradients,)."""
        tensors = [reference() for reference, _ in self._found]
        return value_norms([tensor for tensor in tensors if tensor is not None], self.order)

    @cached_property
    def norm(self) -> Tensor:
        """Norm of all gradients as one vector, a scalar tensor."""
        return combine_norms(self.each, self.order)

    @cached_property
    def total(self) -> float:
        """Norm of all gradients as one vector."""
        return Measured(self.each, self.order).total

    def scaled(self, factor: float) -> Measured:
        """Return the norms of the gradients times a factor."""
        return Measured(self.each, self.order, factor=factor)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.known:
            return Measured, (self.each, self.order)
        return Later, ((), self.order)
