"""The gradients of one step, whose norms are measured once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate

from clipquant.clip.norms import combine_norms, tensor_norms


class Gradients(Sequence[Tensor]):
    """A sequence of gradients whose norms are measured at most once, however many readers ask.

    Args:
        tensors: The gradients, all present.
        groups: Index of the parameter group of each gradient; all 0 where not given.
        positions: Position of each gradient's parameter among all parameters, stable from step to step.
        loss_scale: Factor that the tensors still carry; norms are given without it.

    Example:
        >>> Gradients([torch.tensor([3.0]), torch.tensor([4.0])]).norm()
        tensor(5.)
    """

    def __init__(
        self,
        tensors: Sequence[Tensor],
        groups: Sequence[int] | None = None,
        positions: Sequence[int] | None = None,
        loss_scale: float = 1.0,
    ) -> None:
        self.tensors = tuple(tensors)
        self.groups = tuple(groups) if groups is not None else (0,) * len(self.tensors)
        self.positions = (
            tuple(positions) if positions is not None else tuple(range(len(self.tensors)))
        )
        self.loss_scale = loss_scale
        self._norms: dict[float, Tensor] = {}

    def norms(self, order: float = 2.0) -> Tensor:
        """Return the norm of each gradient, shape (len(self),)."""
        if order not in self._norms:
            measured = tensor_norms(self.tensors, order)
            self._norms[order] = measured if self.loss_scale == 1.0 else measured / self.loss_scale
        return self._norms[order]

    def norm(self, order: float = 2.0) -> Tensor:
        """Return the norm of all gradients seen as one vector, a scalar tensor."""
        return combine_norms(self.norms(order), order)

    def measured(self, order: float = 2.0) -> bool:
        """Return whether the norms of this order are known already, so that asking costs nothing."""
        return order in self._norms

    def with_norms(self, norms: Tensor, order: float) -> Gradients:
        """Return the same gradients with norms that were measured elsewhere."""
        known = self.select(range(len(self)))
        known._norms = {**self._norms, order: norms}
        return known

    def unmeasured(self) -> Gradients:
        """Return the same gradients without norms, for when their elements have changed."""
        return Gradients(self.tensors, self.groups, self.positions, self.loss_scale)

    def select(self, members: Sequence[int]) -> Gradients:
        """Return the gradients at these indices; norms known already are not measured again."""
        part = Gradients(
            [self.tensors[i] for i in members],
            [self.groups[i] for i in members],
            [self.positions[i] for i in members],
            self.loss_scale,
        )
        part._norms = {order: norms[list(members)] for order, norms in self._norms.items()}
        return part

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        return self.tensors[index]

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)


def writable(grad: Tensor) -> Tensor:
    """Return `grad`, or an equal gradient whose stored values can be clipped in place.

    Duplicate entries of a sparse gradient are summed, lazily conjugated values are written out, the partial sums of a
    distributed gradient are added up, and one whose elements share memory (an expanded one) or that was made in
    inference mode is copied.

    Args:
        grad: A gradient of any kind.

    Returns:
        `grad` itself in the common case.
    """
    if grad.layout is torch.sparse_coo:
        return grad.coalesce()
    if not isinstance(grad, DTensor) and (grad.is_inference() or overlaps(grad)):
        return grad.clone(memory_format=torch.contiguous_format)
    if isinstance(grad, DTensor) and any(isinstance(p, Partial) for p in grad.placements):
        return grad.redistribute(
            placements=[Replicate() if isinstance(p, Partial) else p for p in grad.placements]
        )
    return grad.resolve_conj() if grad.is_complex() else grad


def overlaps(tensor: Tensor) -> bool:
    """Return whether elements of a strided tensor share memory, so that writing to one changes another.

    Example:
        >>> overlaps(torch.ones(1).expand(3)), overlaps(torch.ones(4, 4).t()[::2])
        (True, False)
    """
    if tensor.layout is not torch.strided or tensor.is_contiguous():
        return False
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.numel() > reach
