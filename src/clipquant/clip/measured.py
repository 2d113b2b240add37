"""Norms of the gradients of one step, measured when somebody reads them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from clipquant.clip.norms import combine_norms, value_norms, vector_norm

_TINY = 1e-30  # below, squares of float32 lose digits


class Measured:
    """Norms of gradients: of each, and of all as one vector.

    Small gradients come joined, as a copy that nobody changes: their norms are what they were when it was made,
    whenever they are read, and cost nothing where they are not.

    Args:
        values: The norm of each gradient; or, with `sizes`, what each gradient's norm is made of, joined in one vector.
        order: Order of the norms.
        sizes: How many of the values belong to each gradient.
        factor: What to multiply the norms by.
        limit: Largest magnitude that the values count with.

    Example:
        >>> joined = Measured(torch.tensor([3.0, 4.0, 12.0]), 2.0, sizes=(2, 1))
        >>> joined.total, joined.each.tolist()
        (13.0, [5.0, 12.0])
    """

    def __init__(
        self,
        values: Tensor,
        order: float = 2.0,
        sizes: Sequence[int] | None = None,
        factor: float = 1.0,
        limit: float = math.inf,
    ) -> None:
        self.order = order
        self._values, self._sizes, self._factor, self._limit = values, sizes, factor, limit

    @property
    def known(self) -> bool:
        """Whether the norms are there to read."""
        return True

    @cached_property
    def each(self) -> Tensor:
        """Norm of each gradient, shape (number of gradients,)."""
        values = self._limited
        if self._sizes is not None:
            values = value_norms(values.split(list(self._sizes)), self.order)
        return values if self._factor == 1.0 else values * self._factor

    @cached_property
    def norm(self) -> Tensor:
        """Norm of all gradients as one vector, a scalar tensor."""
        norm = combine_norms(self._limited, self.order)
        return norm if self._factor == 1.0 else norm * self._factor

    @cached_property
    def total(self) -> float:
        """Norm of all gradients as one vector, which costs one wait for the device."""
        values = self._limited
        if self._sizes is not None and self.order == 2.0:  # one call, in a third of the time
            square = torch.dot(values, values).item()
            if _TINY < square < math.inf:
                return math.sqrt(square) * self._factor
        total = vector_norm(values, self.order).item() if values.numel() else 0.0
        if math.isinf(total):  # maybe only powers that overflow
            total = combine_norms(values, self.order).item()
        return total * self._factor

    def scaled(self, factor: float) -> Measured:
        """Return the norms of the gradients times a factor."""
        return Measured(self._values, self.order, self._sizes, self._factor * factor, self._limit)

    def limited(self, limit: float) -> Measured:
        """Return the norms of the gradients after a clamp of every element; they must be joined."""
        return Measured(self._values, self.order, self._sizes, self._factor, limit / self._factor)

    @property
    def _limited(self) -> Tensor:
        if self._limit == math.inf:
            return self._values
        return self._values.clamp(-self._limit, self._limit)
