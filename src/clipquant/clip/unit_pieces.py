"""Unit-wise scaling of plain gradients: large ones by rows that stay in the cache, tiny ones joined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from clipquant.clip.outcome import Outcome
from clipquant.clip.pieces import Piece, Pieces
from clipquant.clip.units import UnitLimits

_PIECE = 1 << 21  # elements; with their weights, 16 MB
_TINY = (
    1 << 12
)  # elements; below, a call costs more than the copy that lets one call serve many tensors
_CHUNK = 1 << 18  # elements of tiny tensors that are joined
_LONG = 1024  # elements of a row; of shorter ones a part takes as long to read as the whole

# Scales rows one of which is not finite, whose squares overflow or that is to become zero: returns norms before and
# after, and whether all are finite.
Careful = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, bool]]


class Scaling:
    """A scaling of the units of many gradients, and what it has come to so far.

    Args:
        limits: Ratio and smallest weight norm.
        count: Number of gradients.
        careful: What scales rows that need care.
    """

    def __init__(self, limits: UnitLimits, count: int, careful: Careful) -> None:
        self.limits, self.careful = limits, careful
        self.clipped, self.finite = False, True
        self._hopeful = True  # that the next rows are within, as the last ones were
        self._count = count
        self._before: list[Piece] = []
        self._after: list[Piece] = []

    def outcome(self, measure: bool) -> Outcome:
        """Return what it came to; norms are left to whoever reads them."""
        if not measure:
            return Outcome(self.clipped, self.finite)
        before = after = Pieces(self._count, self._before)
        if self.clipped:
            after = Pieces(self._count, self._after)
        return Outcome(self.clipped, self.finite, before, after)

    def large_(self, owner: int, grad: Tensor, weight: Tensor) -> None:
        """Scale the units of one gradient, some rows at a time."""
        units = grad.shape[0] if grad.ndim > 1 else 1
        rows, weights = grad.view(units, -1), weight.view(units, -1)
        height = max(1, _PIECE * units // grad.numel())
        if height >= units:
            self._rows_(owner, rows, weights)
            return
        for piece, own in zip(rows.split(height), weights.split(height), strict=True):
            self._rows_(owner, piece, own)

    def _rows_(self, owner: int, rows: Tensor, weights: Tensor) -> None:
        norms = _row_norms(rows)
        # A part of the weights decides only where nothing is clipped, and is read for nothing elsewhere.
        if self._hopeful and _are_within(norms, weights, self.limits):
            after, finite = norms, True
        else:
            limits = _row_norms(weights).clamp_(min=self.limits.eps).mul_(self.limits.ratio)
            coefficients = limits.div_(norms.clamp(min=1e-6)).clamp_(max=1.0)
            least, finite = coefficients.min().item(), True
            if least >= 1:
                after = norms
            elif least > 0:
                rows.mul_(coefficients.unsqueeze(1))
                after = norms * coefficients
                self.clipped = True
            else:
                norms, after, finite = self.careful(rows, weights)
                self.clipped = self.clipped or after is not norms
            self._hopeful = after is norms
        self.finite = self.finite and finite
        self._saw([owner], [norms.numel()], norms, after)

    def tiny_(
        self, owners: Sequence[int], grads: Sequence[Tensor], weights: Sequence[Tensor], row: int
    ) -> None:
        """Scale the units of gradients whose units have equally many elements, joined in one matrix."""
        rows = _flatten_dense_tensors(grads).view(-1, row)
        norms = _row_norms(rows)
        own = _row_norms(_flatten_dense_tensors(weights).view(-1, row))
        coefficients = self.limits.coefficients(norms, own)
        least = coefficients.min().item()
        if not least > 0:
            for owner, grad, weight in zip(owners, grads, weights, strict=True):
                self.large_(owner, grad, weight)
            return
        after = norms
        if least < 1:
            after = norms * coefficients
            self.clipped = True
            if all(grad.ndim < 2 for grad in grads):
                torch._foreach_mul_(list(grads), coefficients.tolist())
            else:
                rows.mul_(coefficients[:, None])
                torch._foreach_copy_(list(grads), _unflatten_dense_tensors(rows.view(-1), grads))
        sizes = [grad.numel() // row for grad in grads]
        self._saw(owners, sizes, norms, after)

    def _saw(
        self, owners: Sequence[int], sizes: Sequence[int], norms: Tensor, after: Tensor
    ) -> None:
        self._before.append(Piece(owners, sizes, norms))
        self._after.append(Piece(owners, sizes, after))


def are_rows(tensors: Sequence[Tensor]) -> bool:
    """Return whether all are float32 tensors of a CPU without gaps, so that rows are views."""
    return all(
        type(tensor) in (Tensor, nn.Parameter)  # a distributed one is more than its rows here
        and tensor.dtype is torch.float32
        and tensor.is_cpu
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        for tensor in tensors
    )


def scale_plain_(
    grads: Sequence[Tensor],
    weights: Sequence[Tensor],
    limits: UnitLimits,
    measure: bool,
    careful: Careful,
) -> Outcome:
    """Scale the units along the first axis of gradients for which, as for their weights, `are_rows` holds, in place.

    Args:
        grads: The gradients.
        weights: Their weights, in the same order.
        limits: Ratio and smallest weight norm.
        measure: Whether to return norms.
        careful: What scales rows that are not finite, whose squares overflow or that are to become zero.

    Returns:
        The outcome on this process.
    """
    scaling = Scaling(limits, len(grads), careful)
    chunks, alone = _chunks(grads)
    for row, owners in chunks:
        chosen = [grads[i] for i in owners], [weights[i] for i in owners]
        scaling.tiny_(owners, *chosen, row)
    for i in alone:
        scaling.large_(i, grads[i], weights[i])
    return scaling.outcome(measure)


def _chunks(grads: Sequence[Tensor]) -> tuple[list[tuple[int, list[int]]], list[int]]:
    """Return tiny gradients by the elements of their rows, as many at a time as are joined, and all others."""
    by_row: dict[int, list[int]] = {}
    alone: list[int] = []
    for i, grad in enumerate(grads):
        size = grad.numel()
        if size > _TINY:
            alone.append(i)
        elif size:
            by_row.setdefault(size // grad.shape[0] if grad.ndim > 1 else size, []).append(i)
    chunks: list[tuple[int, list[int]]] = []
    for row, members in by_row.items():
        if len(members) == 1:
            alone += members
            continue
        chunks += [(row, chunk) for chunk in _by_size(members, grads)]
    return chunks, alone


def _by_size(members: Sequence[int], grads: Sequence[Tensor]) -> Iterator[list[int]]:
    chunk: list[int] = []
    filled = 0
    for member in members:
        chunk.append(member)
        filled += grads[member].numel()
        if filled >= _CHUNK:
            yield chunk
            chunk, filled = [], 0
    if chunk:
        yield chunk


def _row_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, 2, dim=1)
    return norms


def _are_within(norms: Tensor, weights: Tensor, limits: UnitLimits) -> bool:
    """Return whether the first eighth of each long row alone shows that no unit is beyond its limit.

    The norm of a row is at least that of a part of it; this saves reading most of the weights in most steps. False
    means only that the whole rows have to be asked.
    """
    if weights.shape[1] < _LONG:
        return False
    part = _row_norms(weights[:, : weights.shape[1] // 8])
    return bool(((norms <= limits.of(part)) & (norms < math.inf)).all())
