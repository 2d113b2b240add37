"""Gradients so small that the number of calls is what clipping costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors

from clipquant.clip.assign import Assignment
from clipquant.clip.measured import Measured
from clipquant.clip.record import ClipRecord

_FLOAT32, _STRIDED = torch.float32, torch.strided
_SMALL = 1 << 16  # elements of all gradients together


def are_plain(grads: Sequence[Tensor | None]) -> TypeGuard[list[Tensor]]:
    """Return whether all are there, dense float32 tensors on a CPU that autograd does not follow.

    None of them shares memory within itself.
    """
    for grad in grads:
        if (
            type(grad) is not Tensor
            or grad.dtype is not _FLOAT32
            or grad.layout is not _STRIDED
            or not grad.is_cpu
            or not grad.is_contiguous()
            or grad.requires_grad
            or grad.is_inference()
        ):
            return False
    return bool(grads)


def small_sizes(grads: Sequence[Tensor]) -> tuple[int, ...]:
    """Return the sizes of plain gradients so small together that a copy costs less than a few calls; else nothing."""
    sizes = tuple(map(Tensor.numel, grads))
    return sizes if sum(sizes) <= _SMALL and all(sizes) else ()


def clamp_small_(assignment: Assignment, watch: bool, measure: bool) -> ClipRecord | None:
    """Clamp gradients that are plain and small, for an assignment that is one clamp of all.

    Args:
        assignment: Who clips what; its `limit` is not None.
        watch: Whether gradients that are not finite are to be left as they are.
        measure: Whether norms are asked for, which are left to whoever reads them.

    Returns:
        What was done; None, and nothing changed, where the gradients are of another kind or not finite.
    """
    limit = assignment.limit
    grads = [param.grad for param in assignment.params]
    if limit is None or not are_plain(grads):
        return None
    sizes = small_sizes(grads)
    if not sizes:
        return None
    before: Measured | None = None
    after: Measured | None = None
    clipped = True
    if watch or measure:
        joined = _flatten_dense_tensors(grads)
        if measure and len(grads) == 1:  # of a single tensor it is a view, not a copy
            joined = joined.clone()
        least, most = torch.aminmax(joined)
        low, high = least.item(), most.item()
        if watch and not (low > -math.inf and high < math.inf):
            return None
        clipped = not (-limit <= low and high <= limit)
        if measure:
            before = after = Measured(joined, assignment.order, sizes)
            if clipped:
                after = before.limited(limit)
    if clipped:
        torch._foreach_clamp_min_(grads, -limit)
        torch._foreach_clamp_max_(grads, limit)
    return ClipRecord(
        clipped=clipped,
        before=before,
        after=after,
        names=assignment.names,
        groups=assignment.groups,
        order=assignment.order,
    )
