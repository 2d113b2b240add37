"""Unit-wise scaling: each output channel of a gradient against the same channel of its weight."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from clipquant.clip.blocks import Block, blocks, gather_norms
from clipquant.clip.norms import EXACT, norms_of_owners, value_norms, vector_norm
from clipquant.clip.plans import Outcome, ScaleUnits
from clipquant.clip.shards import local_values, reduce_parts, sharded_dims


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
    norms = _row_norms(values) if tensor.ndim > 1 else vector_norm(values, 2)
    if math.inf in norms.flatten().tolist():
        double = values.double()
        norms = _row_norms(double) if tensor.ndim > 1 else vector_norm(double, 2)
    if isinstance(tensor, DTensor):
        placements = tensor.placements
        dims = sharded_dims(tensor)
        if tensor.ndim > 1:  # a shard along the first axis holds its units as a whole
            dims = tuple(d for d in dims if getattr(placements[d], "dim", None) != 0)
        return reduce_parts(norms, tensor.device_mesh, dims, 2.0) if dims else norms
    return norms


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


def scale_units_(
    grads: Sequence[Tensor], params: Sequence[Tensor], plan: ScaleUnits, leave: bool
) -> Outcome:
    """Scale each unit of each gradient in place; the norms of gradients follow from those of their units.

    Args:
        grads: Gradients of any kind.
        params: Their weights, in the same order.
        plan: Ratio and smallest weight norm.
        leave: Leave gradients with a non-finite element as they are, and say so.

    Returns:
        The outcome on this process, with norms of order 2.
    """
    before: list[tuple[Block, Tensor]] = []
    after: list[tuple[Block, Tensor]] = []
    clipped, finite = False, True
    for block in blocks(grads, split=False):
        plain = [i for i in block.owners if _is_plain(grads[i]) and _is_plain(params[i])]
        odd = [[i] for i in block.owners if i not in set(plain)]
        for members in [plain, *odd] if plain else odd:
            scale_ = _scale_plain_ if members is plain else _scale_odd_
            outcome, norms, clipped_norms = scale_(
                [grads[i] for i in members], [params[i].detach() for i in members], plan, leave
            )
            clipped, finite = clipped or outcome.clipped, finite and outcome.finite
            before.append((Block(tuple(members), ()), norms))
            after.append((Block(tuple(members), ()), clipped_norms))
    count = len(grads)
    return Outcome(
        clipped, finite, gather_norms(before, count, 2.0), gather_norms(after, count, 2.0)
    )


def _scale_plain_(
    grads: Sequence[Tensor], params: Sequence[Tensor], plan: ScaleUnits, leave: bool
) -> tuple[Outcome, Tensor, Tensor]:
    """Scale dense gradients of one device: the coefficients of all their units are one vector."""
    units, sizes = _unit_vector(grads)
    owners = torch.arange(len(grads)).repeat_interleave(torch.tensor(sizes)).to(units.device)
    before = norms_of_owners(units, owners, len(grads))
    if leave and not all(map(math.isfinite, before.tolist())):
        return Outcome(False, False), before, before
    coefficients = unit_coefficients(units, _unit_vector(params)[0], plan)
    beyond = ~(coefficients >= 1)
    if not bool(beyond.any()):
        return Outcome(False), before, before
    counts = beyond.new_zeros(len(grads), dtype=torch.float32).index_add_(0, owners, beyond.float())
    _multiply_(grads, coefficients.split(sizes), counts.tolist())
    return Outcome(True), before, norms_of_owners(units * coefficients, owners, len(grads))


def _scale_odd_(
    grads: Sequence[Tensor], params: Sequence[Tensor], plan: ScaleUnits, leave: bool
) -> tuple[Outcome, Tensor, Tensor]:
    """Scale one gradient of any kind."""
    (grad,), (param,) = grads, params
    if grad.layout is torch.sparse_coo:
        values, coefficients = _sparse_units(grad, param, plan)
    else:
        values = local_values(grad)
        # Other processes take part in these norms: they have to be asked for before anything is decided.
        coefficients = unit_coefficients(unit_norms(grad), unit_norms(param), plan)
    before = value_norms([values])
    if leave and not math.isfinite(before.item()):
        return Outcome(False, False), before, before
    if values.numel() == 0 or bool((coefficients >= 1).all()):
        return Outcome(False), before, before
    values.mul_(coefficients.to(values.dtype))
    return Outcome(True), before, value_norms([values])


def _multiply_(
    grads: Sequence[Tensor], coefficients: Sequence[Tensor], clipped: Sequence[float]
) -> None:
    """Multiply each gradient with clipped units by their coefficients; those of one unit all in one call."""
    vectors: list[Tensor] = []
    factors: list[float] = []
    for grad, own, count in zip(grads, coefficients, clipped, strict=True):
        if count and grad.ndim > 1:
            grad.mul_(own.view(-1, *[1] * (grad.ndim - 1)).to(grad.dtype))
        elif count:
            vectors.append(grad)
            factors.append(float(own))
    if vectors:
        torch._foreach_mul_(vectors, factors)


def _unit_vector(tensors: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the norms of all units of all tensors in one vector, and each tensor's number of units."""
    vectors = [tensor for tensor in tensors if tensor.ndim < 2]
    whole = iter(torch._foreach_norm(vectors, 2.0) if vectors else ())
    norms = [_row_norms(t).flatten() if t.ndim > 1 else next(whole).view(1) for t in tensors]
    together = torch.cat(norms)
    if bool(together.isinf().any()):  # maybe only squares that overflow
        doubles = [tensor.double() for tensor in tensors]
        together = torch.cat([unit_norms(tensor).flatten() for tensor in doubles])
    return together, [len(each) for each in norms]


def _row_norms(values: Tensor) -> Tensor:
    """Return the 2-norm of each slice along the first axis, of a shape that multiplies `values`."""
    if values.numel() and values.is_contiguous():  # a matrix takes half the time
        rows: Tensor = torch.linalg.vector_norm(values.view(len(values), -1), 2, dim=1)
        return rows.view(-1, *[1] * (values.ndim - 1))
    return vector_norm(values, 2, tuple(range(1, values.ndim)))


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
