"""Unit-wise scaling: each output channel of a gradient against the same channel of its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipquant.clip.blocks import Block, blocks, gather_norms
from clipquant.clip.norms import EXACT, value_norms, vector_norm
from clipquant.clip.plans import Outcome, ScaleUnits
from clipquant.clip.shards import local_values, reduce_parts, sharded_dims

_BLOCK = 1 << 20  # elements; with their weights, 8 MB in float32


def unit_norms(tensor: Tensor) -> Tensor:
    """Return the 2-norm of each unit: of each slice along the first axis, or of the whole tensor below two axes.

    Args:
        tensor: A strided or distributed tensor of any floating or complex dtype.

    Returns:
        float32 (float64 for double), of a shape that multiplies `tensor`: (rows, 1, ..., 1), or a scalar; of a
        distributed tensor the rows of the local shard.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    values = local_values(tensor)
    values = values.abs() if values.is_complex() else values
    values = values if values.dtype in EXACT else values.float()
    norms = _kept_norms(values, tensor.ndim)
    if math.inf in norms.flatten().tolist():
        norms = _kept_norms(values.double(), tensor.ndim)
    if isinstance(tensor, DTensor):
        placements = tensor.placements
        dims = sharded_dims(tensor)
        if tensor.ndim > 1:  # a shard along the first axis holds its units as a whole
            dims = tuple(d for d in dims if getattr(placements[d], "dim", None) != 0)
        return reduce_parts(norms, tensor.device_mesh, dims, 2.0) if dims else norms
    return norms


def _kept_norms(values: Tensor, ndim: int) -> Tensor:
    """Return the norms of units in the shape that multiplies `values`."""
    if ndim < 2:
        return vector_norm(values, 2)
    return _row_norms(values).view(-1, *[1] * (ndim - 1))


def unit_coefficients(grad_norms: Tensor, weight_norms: Tensor, plan: ScaleUnits) -> Tensor:
    """Return the factor of each unit: `min(1, ratio * max(|w|, eps) / max(|g|, 1e-6))`.

    Args:
        grad_norms: Norm of each unit of the gradient.
        weight_norms: Norm of each unit of the weight, same shape.
        plan: Ratio and smallest weight norm.

    Returns:
        Factors in [0, 1], same shape.
    """
    largest = weight_norms.clamp(min=plan.eps) * plan.ratio
    return (largest / grad_norms.clamp(min=1e-6)).clamp(max=1.0)


def scale_units_(grads: Sequence[Tensor], params: Sequence[Tensor], plan: ScaleUnits) -> Outcome:
    """Scale each unit of each gradient in place; the norms of gradients follow from those of their units.

    Args:
        grads: Gradients of any kind.
        params: Their weights, in the same order.
        plan: Ratio and smallest weight norm.

    Returns:
        The outcome on this process, with norms of order 2.
    """
    plain = [_is_plain(g) and _is_plain(p) for g, p in zip(grads, params, strict=True)]
    scaled: list[_Scaled] = []
    for block in blocks(grads, split=False, size=_BLOCK):
        members = [i for i in block.owners if plain[i]]
        if members:
            scaled.append(_scale_plain_(members, grads, params, plan))
        odd = (i for i in block.owners if not plain[i])
        scaled.extend(_scale_odd_(i, grads[i], params[i], plan) for i in odd)
    before = gather_norms([(each.block, each.before) for each in scaled], len(grads), 2.0)
    after = gather_norms([(each.block, each.after) for each in scaled], len(grads), 2.0)
    finite = all(map(math.isfinite, before.tolist()))
    return Outcome(any(each.clipped for each in scaled), finite, before, after)


@dataclass(frozen=True)
class _Scaled:
    """What was done to some gradients, and the norm of each before and after."""

    block: Block
    before: Tensor
    after: Tensor
    clipped: bool


def _scale_plain_(
    members: Sequence[int], grads: Sequence[Tensor], params: Sequence[Tensor], plan: ScaleUnits
) -> _Scaled:
    """Scale dense gradients of one device: the coefficients of all their units are one vector."""
    members = sorted(members, key=lambda i: grads[i].ndim < 2)
    own, weights = [grads[i] for i in members], [params[i] for i in members]
    weight_norms, sizes = _unit_vector(weights)
    units, _ = _unit_vector(
        own
    )  # last, so that the gradients are in the cache when they are scaled
    coefficients = unit_coefficients(units, weight_norms, plan)
    least = coefficients.min().item() if coefficients.numel() else 1.0
    if not least > 0 and bool(units.isinf().any()):
        # Maybe only squares that overflow.
        units = torch.cat([unit_norms(grad.double()).flatten() for grad in own])
        coefficients = unit_coefficients(units, weight_norms, plan)
    block, before = Block(tuple(members), ()), _norms_of_units(units, sizes)
    if least >= 1:
        return _Scaled(block, before, before, clipped=False)
    _multiply_(own, coefficients, sizes)
    return _Scaled(block, before, _norms_of_units(units * coefficients, sizes), clipped=True)


def _scale_odd_(owner: int, grad: Tensor, param: Tensor, plan: ScaleUnits) -> _Scaled:
    """Scale one gradient of any kind, which counts as one unit as to its norm."""
    if grad.layout is torch.sparse_coo:
        values, coefficients = _sparse_units(grad, param, plan)
    else:
        values = local_values(grad)
        coefficients = unit_coefficients(unit_norms(grad), unit_norms(param), plan)
    before = after = value_norms([values])
    clipped = values.numel() > 0 and not bool((coefficients >= 1).all())
    if clipped:
        values.mul_(coefficients.to(values.dtype))
        after = value_norms([values])
    return _Scaled(Block((owner,), ()), before, after, clipped)


def _norms_of_units(units: Tensor, sizes: Sequence[int]) -> Tensor:
    """Return the norm of each gradient from those of its units, which lie side by side; finite where those are."""
    # One call a gradient rather than an index for each unit: that would wake all threads for little work.
    total = torch.stack(list(torch._foreach_norm(units.double().split(list(sizes)), 2.0)))
    result = total.to(units.dtype)
    return total if math.inf in result.tolist() else result


def _multiply_(grads: Sequence[Tensor], coefficients: Tensor, sizes: Sequence[int]) -> None:
    """Multiply gradients by the coefficients of their units; those of one unit, which come last, all in one call."""
    vectors: list[Tensor] = []
    for grad, own in zip(grads, coefficients.split(list(sizes)), strict=True):
        if grad.ndim > 1:
            grad.mul_(own.view(-1, *[1] * (grad.ndim - 1)).to(grad.dtype))
        else:
            vectors.append(grad)
    if vectors:
        torch._foreach_mul_(vectors, coefficients[-len(vectors) :].tolist())


def _unit_vector(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the norms of all units in one vector, and each tensor's number of units; tensors of one unit come last."""
    rows = [_row_norms(tensor) for tensor in tensors if tensor.ndim > 1]
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    sizes = [*map(Tensor.numel, rows), *[1] * len(vectors)]
    whole = [torch.stack(list(torch._foreach_norm(vectors, 2.0)))] if vectors else []
    return torch.cat([*rows, *whole]), sizes


def _row_norms(values: Tensor) -> Tensor:
    """Return the 2-norm of each slice along the first axis as a vector."""
    if values.numel() and values.is_contiguous():  # a matrix takes half the time
        values = values if values.ndim == 2 else values.view(len(values), -1)
        norms: Tensor = torch.linalg.vector_norm(values, 2, dim=1)
        return norms
    return vector_norm(values, 2, tuple(range(1, values.ndim))).view(-1)


def _is_plain(tensor: Tensor) -> bool:
    return (
        tensor.layout is torch.strided and tensor.dtype in EXACT and not isinstance(tensor, DTensor)
    )


def _sparse_units(grad: Tensor, param: Tensor, plan: ScaleUnits) -> tuple[Tensor, Tensor]:
    """Return the stored values of a sparse gradient and the coefficient of each: only rows that it holds are read."""
    values = grad.values()
    if grad.ndim == 1:
        return values, unit_coefficients(value_norms([values])[0], unit_norms(param), plan)
    rows, entry = grad.indices()[0].unique(return_inverse=True)
    squares = values.abs().double().square().reshape(len(values), -1).sum(1)
    norms = squares.new_zeros(len(rows)).index_add_(0, entry, squares).sqrt()
    weights = unit_norms(param.index_select(0, rows)).reshape(-1)
    coefficients = unit_coefficients(norms, weights, plan)[entry]
    return values, coefficients.reshape(-1, *[1] * (values.ndim - 1))
