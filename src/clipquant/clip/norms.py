"""Norms of tensors of every kind, accumulated in float32 or better."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipquant.clip.shards import local_values, reduce_norms

EXACT = (torch.float32, torch.float64)  # a norm computed in these needs no wider accumulator
_BLOCK = 1 << 18  # elements; a float32 block of 1 MB stays in a core's cache
_LARGE = 1 << 17  # elements; from here on a norm of rows' norms is faster than one long reduction
_ROW = 1024


def vector_norm(
    values: Tensor,
    order: float,
    dim: Sequence[int] | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the norm over all of `values`, or over the axes `dim`, which are kept with length 1."""
    norm: Tensor = torch.linalg.vector_norm(
        values, order, dim=dim, keepdim=dim is not None, dtype=dtype
    )
    return norm


def tensor_norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of each tensor, accumulated in float32 or better; that of a finite tensor is finite.

    Args:
        tensors: Gradients of any shape, layout and floating or complex dtype; a distributed one counts as a whole.
        order: Order p of the norm, `math.inf` for the largest magnitude.

    Returns:
        Shape (len(tensors),), float32, or float64 where a tensor is double or its squares overflow float32.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0, device="cpu")])
        tensor([5., 0.])
    """
    return reduce_norms(
        value_norms([local_values(tensor) for tensor in tensors], order), tensors, order
    )


def value_norms(values: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of each dense tensor of this process; `tensor_norms` without the other processes.

    Args:
        values: Strided tensors.
        order: Order p of the norm.

    Returns:
        Shape (len(values),), as `tensor_norms`.
    """
    return bounded_norms(values, order)[0]


def bounded_norms(values: Sequence[Tensor], order: float = 2.0) -> tuple[Tensor, list[Tensor]]:
    """Return the norm of each dense tensor, and of each some norms among which one reaches its largest element.

    Args:
        values: Strided tensors.
        order: Order p of the norm.

    Returns:
        Shape (len(values),), as `tensor_norms`; for each tensor the norms of its parts, of any shape: no element is
        larger than the largest of them.
    """
    if not values:
        return torch.zeros(0, device="cpu"), []
    home = values[0].device
    if order == math.inf:
        parts = norms = [_largest_magnitude(v) for v in values]
    elif all(v.dtype in EXACT and v.device == home for v in values):
        parts = _part_norms(values, order)
        norms = [p if p.ndim == 0 else _total(p, order) for p in parts]
    else:
        parts = norms = [_norm(v, order) for v in values]
    stacked = _stack(norms, home)
    if order == math.inf or stacked.dtype is torch.float64 or math.inf not in stacked.tolist():
        return stacked, parts
    # An infinite norm may only be squares that overflow: float64 holds the square of every float32.
    doubles = [_norm_in_double(v, order).to(home) for v in values]
    return torch.stack(doubles), doubles


def combine_norms(norms: Tensor, order: float = 2.0) -> Tensor:
    """Return the norm of the concatenation of tensors whose norms are given.

    Args:
        norms: Shape (n,), norms of order `order`.
        order: Order p of the norm.

    Returns:
        A scalar tensor; zero where n is zero.

    Example:
        >>> combine_norms(torch.tensor([3.0, 4.0]))
        tensor(5.)
    """
    if norms.numel() == 0:
        return norms.new_zeros(())
    total = vector_norm(norms, order)
    if norms.dtype is torch.float32 and math.isinf(float(total)):
        return vector_norm(norms.double(), order)
    return total


def norms_by_group(norms: Tensor, groups: Sequence[int], order: float = 2.0) -> Tensor:
    """Return the norm of each group of tensors seen as one vector.

    Args:
        norms: Shape (n,), norms of the tensors.
        groups: Group of each tensor.
        order: Order p of the norms.

    Returns:
        Shape (number of distinct groups,), in ascending order of the group.

    Example:
        >>> norms_by_group(torch.tensor([3.0, 4.0, 2.0]), [0, 0, 1])
        tensor([5., 2.])
    """
    members = [[i for i, group in enumerate(groups) if group == g] for g in sorted(set(groups))]
    return torch.stack([combine_norms(norms[m], order) for m in members]) if members else norms


def norms_of_owners(norms: Tensor, owners: Tensor, count: int, order: float = 2.0) -> Tensor:
    """Return the norm of each owner of pieces whose norms are given; finite where those are.

    Args:
        norms: Shape (n,), norms of the pieces.
        owners: Shape (n,), int64, whose piece each is.
        count: Number of owners.
        order: Order p of the norms.

    Returns:
        Shape (count,), of the dtype of `norms`, or float64 where that would overflow.

    Example:
        >>> norms_of_owners(torch.tensor([3.0, 1.0, 4.0]), torch.tensor([0, 1, 0]), 2)
        tensor([5., 1.])
    """
    total = norms_of_owners_unread(norms.double(), owners, count, order)
    result = total.to(norms.dtype)
    return total if math.inf in result.tolist() else result


def norms_of_owners_unread(norms: Tensor, owners: Tensor, count: int, order: float) -> Tensor:
    """Return what `norms_of_owners` does of norms in float64, without reading a value."""
    zeros = norms.new_zeros(count)
    if order == math.inf:
        return zeros.scatter_reduce(0, owners, norms, "amax")
    return zeros.index_add(0, owners, norms**order) ** (1 / order)


def _part_norms(values: Sequence[Tensor], order: float) -> list[Tensor]:
    """Return the norms of float32 and float64 tensors: of large ones row by row, of all others in one call."""
    rows = [v.numel() >= _LARGE and v.is_cpu for v in values]
    if all(rows):
        return [norms_of_rows(v, order) for v in values]
    others = iter(
        torch._foreach_norm([v for v, by in zip(values, rows, strict=True) if not by], order)
    )
    return [
        norms_of_rows(v, order) if by_rows else next(others)
        for v, by_rows in zip(values, rows, strict=True)
    ]


def norms_of_rows(values: Tensor, order: float) -> Tensor:
    """Return norms of at most 1024 elements each: a float32 sum of more loses digits (15 % of 50 million for p = 1)."""
    vector = flat(values)
    if vector is None:  # copied block by block
        blocks = values.split(max(1, _BLOCK * len(values) // values.numel()))
        return torch.cat([norms_of_rows(b.contiguous(), order) for b in blocks])
    whole = vector.numel() // _ROW * _ROW
    rows: Tensor = torch.linalg.vector_norm(vector[:whole].view(-1, _ROW), order, dim=1)
    if whole == vector.numel():
        return rows
    return torch.cat([rows, torch.linalg.vector_norm(vector[whole:], order).view(1)])


def _total(norms: Tensor, order: float) -> Tensor:
    """Return the norm of what has these norms, summed in float64."""
    total: Tensor = torch.linalg.vector_norm(norms, order, dtype=torch.float64)
    return total.to(norms.dtype)


def flat(values: Tensor) -> Tensor | None:
    """Return all elements in the order in which they lie in memory, without a copy; None where there are gaps."""
    if values.is_contiguous():
        return values.view(-1)
    strides = sorted(zip(values.stride(), values.shape, strict=True))
    expected = 1
    for stride, size in strides:
        if size != 1 and stride != expected:
            return None
        expected *= size
    return values.as_strided((values.numel(),), (1,))


def _stack(norms: Sequence[Tensor], home: torch.device) -> Tensor:
    if len(norms) == 1 and norms[0].device == home:
        return norms[0].view(1)
    dtypes = {n.dtype for n in norms}
    if len(dtypes) == 1 and home.type == "cpu":
        return torch.stack(list(norms))
    dtype = torch.float64 if torch.float64 in dtypes else torch.float32
    return torch.stack([n.to(device=home, dtype=dtype) for n in norms])


def _norm(values: Tensor, order: float) -> Tensor:
    if values.is_complex():
        values = torch.view_as_real(values) if order == 2 else values.abs()
    if values.dtype in EXACT:
        return _total(norms_of_rows(values, order), order)
    # Casting blocks that fit in the cache is many times faster than a norm that casts element by element.
    blocks = (block.float() for block in values.reshape(-1).split(_BLOCK))
    return _total(torch.cat([norms_of_rows(b, order) for b in blocks]), order)


def _norm_in_double(values: Tensor, order: float) -> Tensor:
    magnitudes = values.abs() if values.is_complex() else values
    return vector_norm(magnitudes.double(), order)


def _largest_magnitude(values: Tensor) -> Tensor:
    dtype = torch.float64 if values.dtype in (torch.float64, torch.complex128) else torch.float32
    if values.numel() == 0:
        return torch.zeros((), device=values.device, dtype=dtype)
    if values.is_complex():
        return values.abs().max()
    # Several times faster than the infinity norm on a CPU, and NaN passes through it.
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).to(dtype)
