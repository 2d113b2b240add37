"""The gradients of one step, whose norms are measured once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.distributed.tensor import DTensor, Partial, Replicate

from clipquant.clip.measured import Measured
from clipquant.clip.norms import tensor_norms


class Gradients(Sequence[Tensor]):
    """A sequence of gradients whose norms are measured at most once, however many readers ask.

    Args:
        tensors: The gradients, all present.
        groups: Index of the parameter group of each gradient; all 0 where not given.
        positions: Position of each gradient's parameter among all parameters, stable from step to step.
        loss_scale: Factor that the tensors still carry; norms are given without it.
        small: Whether they are plain float32 tensors on a CPU, together so small that a call costs more than a copy.
        later: Whether norms after clipping may be left to whoever reads them, while the tensors are there.

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
        small: bool = False,
        later: bool = False,
    ) -> None:
        self.tensors = tuple(tensors)
        count = len(self.tensors)
        self.groups = tuple(groups) if groups is not None else (0,) * count
        self.positions = tuple(positions) if positions is not None else tuple(range(count))
        self.loss_scale, self.small, self.later = loss_scale, small, later
        self._joined: Tensor | None = None
        self._measured: dict[float, Measured] = {}

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of elements of each gradient."""
        return tuple([tensor.numel() for tensor in self.tensors])

    @property
    def joined(self) -> Tensor | None:
        """A copy of all elements in one vector, made once; None where the gradients are not small and plain."""
        if self.small and self._joined is None:
            joined = _flatten_dense_tensors(self.tensors)
            # Of a single tensor it is a view, not a copy.
            self._joined = joined if len(self.tensors) > 1 else joined.clone()
        return self._joined

    def measured(self, order: float = 2.0) -> Measured:
        """Return the norms as they are now; of small gradients none is computed before it is read."""
        if order not in self._measured:
            factor = 1.0 / self.loss_scale
            joined = self.joined
            if joined is not None:
                self._measured[order] = Measured(joined, order, self.sizes, factor)
            else:
                norms = tensor_norms(self.tensors, order)
                self._measured[order] = Measured(norms, order, factor=factor)
        return self._measured[order]

    def norms(self, order: float = 2.0) -> Tensor:
        """Return the norm of each gradient, shape (len(self),)."""
        return self.measured(order).each

    def norm(self, order: float = 2.0) -> Tensor:
        """Return the norm of all gradients seen as one vector, a scalar tensor."""
        return self.measured(order).norm

    def knows(self, order: float = 2.0) -> bool:
        """Return whether the norms of this order are known already, so that asking costs nothing."""
        return order in self._measured

    def with_norms(self, norms: Measured) -> Gradients:
        """Return the same gradients with norms that were measured elsewhere."""
        same = self.unmeasured()
        same._measured = {**self._measured, norms.order: norms}
        return same

    def unmeasured(self) -> Gradients:
        """Return the same gradients without norms, for when their elements have changed."""
        return Gradients(self.tensors, self.groups, self.positions, self.loss_scale, self.small)

    def select(self, members: Sequence[int]) -> Gradients:
        """Return the gradients at these indices; norms known already are not measured again."""
        part = Gradients(
            [self.tensors[i] for i in members],
            [self.groups[i] for i in members],
            [self.positions[i] for i in members],
            self.loss_scale,
        )
        part._measured = {
            order: Measured(norms.each[list(members)], order)
            for order, norms in self._measured.items()
        }
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
