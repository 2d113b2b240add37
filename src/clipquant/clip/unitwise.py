"""Unit-wise scaling: each output channel of a gradient against the same channel of its weight."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipquant.clip.measured import Measured
from clipquant.clip.norms import EXACT, norms_of_owners, value_norms
from clipquant.clip.outcome import Outcome
from clipquant.clip.shards import local_values
from clipquant.clip.unit_pieces import are_rows, scale_plain_
from clipquant.clip.units import UnitLimits, front, row_norms, unit_norms, units_of_all

_BLOCK = 1 << 20  # elements; with their weights, 8 MB in float32
_SMALL = 1 << 16  # elements


def scale_units_(
    grads: Sequence[Tensor], params: Sequence[Tensor], limits: UnitLimits, measure: bool = True
) -> Outcome:
    """Scale each unit of each gradient in place; the norms of gradients follow from those of their units.

    Args:
        grads: Gradients of any kind.
        params: Their weights, in the same order.
        limits: Ratio and smallest weight norm.
        measure: Whether to return norms.

    Returns:
        The outcome on this process, with norms of order 2 where asked for.
    """
    if limits.axis == 0 and are_rows(grads) and are_rows(params):
        return scale_plain_(grads, params, limits, measure, partial(_scale_carefully_, limits))
    plain = [_is_plain(g) and _is_plain(p) for g, p in zip(grads, params, strict=True)]
    if limits.axis != 0:
        grads = [front(g, limits.axis) if plain[i] else g for i, g in enumerate(grads)]
        params = [front(p, limits.axis) if plain[i] else p for i, p in enumerate(params)]
    scaled = [_scale_pieces_(group, limits) for group in _grouped(grads, params, plain)]
    scaled += _scale_odd_ones_(
        [i for i, is_plain in enumerate(plain) if not is_plain], grads, params, limits
    )
    clipped = any(each.clipped for each in scaled)
    finite = all(each.finite for each in scaled)
    if not measure:
        return Outcome(clipped, finite)
    before = Measured(_norms_of_grads([(s.owners, s.before) for s in scaled], len(grads)))
    if not clipped:
        return Outcome(clipped, finite, before, before)
    after = Measured(_norms_of_grads([(s.owners, s.after) for s in scaled], len(grads)))
    return Outcome(clipped, finite, before, after)


def scale_small_(
    grads: Sequence[Tensor], params: Sequence[Tensor], limits: UnitLimits
) -> Outcome | None:
    """Scale small plain gradients as `scale_units_` does, in as few calls as there can be.

    Returns:
        The outcome, its norms of order 2 left to whoever reads them; None, and nothing changed, where a unit is not
        finite, its squares overflow or it is to become zero.
    """
    if limits.axis != 0:
        grads = [front(grad, limits.axis) for grad in grads]
        params = [front(param, limits.axis) for param in params]
    units = _units(grads)
    sizes = [unit.numel() for unit in units]
    norms = torch.cat(units)
    coefficients = limits.coefficients(norms, torch.cat(_units(params)))
    least = coefficients.min().item()
    if not least > 0:
        return None
    before = Measured(norms, 2.0, sizes)
    if least >= 1:
        return Outcome(False, True, before, before)
    for grad, own in zip(grads, coefficients.split(sizes), strict=True):
        grad.mul_(own.view([-1, *[1] * (grad.ndim - 1)] if grad.ndim else ()))
    return Outcome(True, True, before, Measured(norms * coefficients, 2.0, sizes))


def _units(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the norms of the units of each tensor as a vector."""
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    own = iter(torch._foreach_norm(vectors) if vectors else ())
    return [next(own).view(1) if t.ndim < 2 else row_norms(t) for t in tensors]


@dataclass(frozen=True)
class _Piece:
    """A gradient or some of its rows, the same part of its weight, and which gradient it is."""

    owner: int
    grad: Tensor
    weight: Tensor


@dataclass(frozen=True)
class _Scaled:
    """What was done to some units.

    Args:
        owners: Gradients, and how many of the units each has, in order.
        before: Norm of each unit before.
        after: The same after; `before` itself where nothing was changed.
        finite: Whether all were finite.
    """

    owners: Sequence[tuple[int, int]]
    before: Tensor
    after: Tensor
    finite: bool

    @property
    def clipped(self) -> bool:
        return self.after is not self.before


def _grouped(
    grads: Sequence[Tensor], params: Sequence[Tensor], plain: Sequence[bool]
) -> Iterator[list[_Piece]]:
    """Yield dense gradients: small ones together, large ones by rows, so that scaling finds them in the cache.

    Of other devices than a CPU all come together: there, each group costs a wait for the device.
    """
    together: dict[torch.device, list[_Piece]] = {}
    filled = 0
    for i, (grad, param) in enumerate(zip(grads, params, strict=True)):
        if not plain[i]:
            continue
        if grad.is_cpu and grad.ndim > 1 and grad.numel() > _SMALL:
            rows = max(1, _BLOCK * len(grad) // grad.numel())
            whole = rows >= len(grad)
            parts = (
                [(grad, param)] if whole else zip(grad.split(rows), param.split(rows), strict=True)
            )
            yield from ([_Piece(i, *part)] for part in parts)
            continue
        if filled > _BLOCK and grad.is_cpu:
            yield together.pop(grad.device)
            filled = 0
        together.setdefault(grad.device, []).append(_Piece(i, grad, param))
        filled += grad.numel() if grad.is_cpu else 0
    yield from together.values()


def _scale_pieces_(pieces: list[_Piece], limits: UnitLimits) -> _Scaled:
    """Scale dense gradients of one device: the coefficients of all their units are one vector."""
    pieces = sorted(pieces, key=lambda piece: piece.grad.ndim < 2)
    units, sizes = _unit_vector([piece.grad for piece in pieces])
    owners = [(piece.owner, size) for piece, size in zip(pieces, sizes, strict=True)]
    if units.numel() == 0:
        return _Scaled(owners, units, units, finite=True)
    weights, _ = _unit_vector([piece.weight for piece in pieces])
    coefficients = limits.coefficients(units, weights)
    least, finite = coefficients.min().item(), True
    if not least > 0:
        if bool(units.isinf().any()):  # maybe only squares that overflow
            units = torch.cat([unit_norms(piece.grad.double()).flatten() for piece in pieces])
            coefficients = limits.coefficients(units, weights)
        finite = bool(units.isfinite().all())
    if least >= 1:
        return _Scaled(owners, units, units, finite)
    _multiply_([piece.grad for piece in pieces], coefficients, sizes)
    return _Scaled(owners, units, units * coefficients, finite)


def _scale_carefully_(
    limits: UnitLimits, rows: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, bool]:
    """Scale rows whatever they hold; return their norms before and after, and whether all are finite."""
    scaled = _scale_pieces_([_Piece(0, rows, weights)], limits)
    return scaled.before, scaled.after, scaled.finite


def _scale_odd_ones_(
    members: Sequence[int], grads: Sequence[Tensor], params: Sequence[Tensor], limits: UnitLimits
) -> list[_Scaled]:
    """Scale gradients of any kind, each of which counts as one unit as to its norm."""
    dense = [i for i in members if grads[i].layout is not torch.sparse_coo]
    norms = units_of_all([t[i] for t in (grads, params) for i in dense], limits.axis)
    own = dict(zip(dense, zip(norms[: len(dense)], norms[len(dense) :], strict=True), strict=True))
    scaled: list[_Scaled] = []
    for i in members:
        if i in own:
            values = front(local_values(grads[i]), limits.axis)
            coefficients = limits.coefficients(*own[i])
        else:
            values, coefficients = _sparse_units(grads[i], params[i], limits)
        before = after = value_norms([values])
        if values.numel() > 0 and not bool((coefficients >= 1).all()):
            values.mul_(coefficients.to(values.dtype))
            after = value_norms([values])
        scaled.append(_Scaled([(i, 1)], before, after, math.isfinite(before.item())))
    return scaled


def _norms_of_grads(
    units: Sequence[tuple[Sequence[tuple[int, int]], Tensor]], count: int
) -> Tensor:
    """Return the norm of each gradient from those of its units."""
    if not units:
        return torch.zeros(0, device="cpu")
    home = units[0][1].device
    owners, sizes = zip(*(owner for own, _ in units for owner in own), strict=True)
    owner_of_unit = torch.tensor(owners, device="cpu").repeat_interleave(
        torch.tensor(sizes, device="cpu")
    )
    norms = torch.cat([norms.to(home) for _, norms in units])
    return norms_of_owners(norms, owner_of_unit.to(home), count)


def _multiply_(grads: Sequence[Tensor], coefficients: Tensor, sizes: Sequence[int]) -> None:
    """Multiply gradients by the coefficients of their units; those of one unit, which come last, all in one call."""
    vectors = [grad for grad in grads if grad.ndim < 2]
    own = coefficients.split(list(sizes)) if len(grads) > 1 else [coefficients]
    for grad, factors in zip(grads[: len(grads) - len(vectors)], own, strict=False):
        grad.mul_(factors.view(-1, *[1] * (grad.ndim - 1)).to(grad.dtype))
    if vectors:
        torch._foreach_mul_(vectors, coefficients[-len(vectors) :].tolist())


def _unit_vector(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the norms of all units in one vector, and each tensor's number of units; tensors of one unit come last."""
    norms = [row_norms(tensor) for tensor in tensors if tensor.ndim > 1]
    sizes = [*map(Tensor.numel, norms), *[1] * (len(tensors) - len(norms))]
    if len(norms) < len(tensors):
        norms.append(torch.stack(list(torch._foreach_norm(list(tensors[len(norms) :]), 2.0))))
    return norms[0] if len(norms) == 1 else torch.cat(norms), sizes


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and tensor.dtype in EXACT and not isinstance(tensor, DTensor)
    )


def _sparse_units(grad: Tensor, param: Tensor, limits: UnitLimits) -> tuple[Tensor, Tensor]:
    """Return the stored values of a sparse gradient and the coefficient of each: only rows that it holds are read."""
    values = grad.values()
    if grad.ndim == 1:
        return values, limits.coefficients(value_norms([values])[0], unit_norms(param))
    if len(values) == 0:
        return values, values.new_ones(0)
    rows, entry = grad.indices()[0].unique(return_inverse=True)
    squares = values.abs().double().square().reshape(len(values), -1).sum(1)
    norms = squares.new_zeros(len(rows)).index_add_(0, entry, squares).sqrt()
    weights = unit_norms(param.index_select(0, rows)).reshape(-1)
    coefficients = limits.coefficients(norms, weights)[entry]
    return values, coefficients.reshape(-1, *[1] * (values.ndim - 1))
