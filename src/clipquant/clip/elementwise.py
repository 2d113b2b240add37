"""Plans that map each element by itself: blocks are measured, written and measured again while in the cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from clipquant.clip.blocks import Block, blocks, gather_norms
from clipquant.clip.measured import Measured
from clipquant.clip.norms import bounded_norms, value_norms
from clipquant.clip.outcome import Outcome
from clipquant.clip.streaming import clamp_plain_

# Elements; below, a call costs more than the copy that lets one call serve many tensors.
_SMALL = 1 << 12


def clamp_(
    tensors: Sequence[Tensor],
    limit: float,
    leave: bool,
    tell: bool,
    order: float | None,
    later: bool = False,
) -> Outcome:
    """Clamp every element in place.

    Args:
        tensors: Gradients of any kind; of a distributed one the local shard.
        limit: Largest magnitude of an element.
        leave: Leave a block with a non-finite element as it is, and say so.
        tell: Whether it matters if anything was clipped. Without, and without norms, this is one pass over memory.
        order: Order of the norms to measure; None for none.
        later: Whether norms after clipping may be left to whoever reads them, while the gradients are there.

    Returns:
        The outcome on this process.
    """
    if not (leave or tell or order is not None):
        for block in blocks(tensors, split=False):
            for values in _reals(block.values):
                values.clamp_(-limit, limit)
        return Outcome(clipped=True)
    if order in (None, 2.0):
        outcome = clamp_plain_(tensors, limit, leave, order is not None, later)
        if outcome is not None:
            return outcome
    if order is not None:
        return _stream_(tensors, leave, order, partial(_clamp_reaching_, limit))
    return _clamp_unmeasured_(tensors, limit, leave)


def _clamp_unmeasured_(tensors: Sequence[Tensor], limit: float, leave: bool) -> Outcome:
    clipped, finite = False, True
    for block in blocks(tensors):
        for group in _groups(_reals(block.values)):
            largest = _largest(group)
            if leave and not math.isfinite(largest):
                finite = False
            elif not largest <= limit:
                _clamp_each_(group, limit)
                clipped = True
    return Outcome(clipped, finite)


def indicate_(
    tensors: Sequence[Tensor], threshold: float, leave: bool, order: float | None
) -> Outcome:
    """Write 1 over every element beyond the threshold and 0 over every other; arguments as for `clamp_`."""
    return _stream_(tensors, leave, order or 2.0, partial(_indicate_each_, threshold))


def _stream_(
    tensors: Sequence[Tensor],
    leave: bool,
    order: float,
    change_: Callable[[Sequence[Tensor], Sequence[Tensor], bool], bool],
) -> Outcome:
    """Measure each block, let `change_` write it, measure it again.

    `change_` gets the block's tensors, for each tensor norms of its parts, and whether anything was changed before this
    block, in which case it need not find out again; it returns whether the block may have changed.
    """
    before: list[tuple[Block, Tensor]] = []
    after: list[tuple[Block, Tensor]] = []
    clipped, finite = False, True
    for block in blocks(tensors):
        norms, parts = bounded_norms(block.values, order)
        clipped_norms = norms
        if leave and not all(map(math.isfinite, norms.tolist())):
            finite = False
        elif change_(block.values, parts, clipped):
            clipped, clipped_norms = True, value_norms(block.values, order)
        before.append((block, norms))
        after.append((block, clipped_norms))
    norms_before = Measured(gather_norms(before, len(tensors), order), order)
    norms_after = norms_before
    if clipped:
        norms_after = Measured(gather_norms(after, len(tensors), order), order)
    return Outcome(clipped, finite, norms_before, norms_after)


def _clamp_reaching_(
    limit: float, values: Sequence[Tensor], norms: Sequence[Tensor], clipped: bool
) -> bool:
    """Clamp the tensors with a part whose norm is beyond the limit: in no other can an element be."""
    reaching = _reals(
        v
        for v, parts in zip(values, norms, strict=True)
        if not (parts if parts.ndim == 0 else parts.max()).item() <= limit
    )
    groups = list(_groups(reaching))
    if not clipped and all(_largest(group) <= limit for group in groups):
        return False
    for group in groups:
        _clamp_each_(group, limit)
    return bool(groups)


def _indicate_each_(
    threshold: float, values: Sequence[Tensor], _: Sequence[Tensor], clipped: bool
) -> bool:
    for each in values:
        ones = ~(each.abs() <= threshold)
        clipped = clipped or bool((each != ones).any())
        each.copy_(ones)
    return clipped


def _clamp_each_(values: list[Tensor], limit: float) -> None:
    if len(values) == 1:
        values[0].clamp_(-limit, limit)
    else:
        torch._foreach_clamp_min_(values, -limit)
        torch._foreach_clamp_max_(values, limit)


def _largest(values: Sequence[Tensor]) -> float:
    """Return the largest magnitude among all elements; NaN where one is NaN."""
    together = values[0] if len(values) == 1 else torch.cat([v.reshape(-1) for v in values])
    low, high = (extreme.item() for extreme in torch.aminmax(together))
    # Through NaN the comparison fails, which gives NaN back.
    return max(-low, high) if low <= high else math.nan


def _groups(values: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield the small tensors together, then each large one alone; empty ones not at all."""
    small = [v for v in values if 0 < v.numel() <= _SMALL and v.dtype is torch.float32]
    if small:
        yield small
    for v in values:
        if v.numel() > _SMALL or (v.numel() and v.dtype is not torch.float32):
            yield [v]


def _reals(values: Iterable[Tensor]) -> list[Tensor]:
    """Return complex tensors as pairs of reals, others as they are."""
    return [torch.view_as_real(v) if v.is_complex() else v for v in values]
