"""Norms of gradients: measured once, in float32 or better, over tensors of every kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

_EXACT = (torch.float32, torch.float64)  # a norm computed in these needs no wider accumulator
_BLOCK = 1 << 18  # elements; a float32 block of 1 MB stays in a core's cache


def vector_norm(values: Tensor, order: float, dim: Sequence[int] | None = None) -> Tensor:
    """Return the norm over all of `values`, or over the axes `dim`, which are kept with length 1."""
    norm: Tensor = torch.linalg.vector_norm(values, order, dim=dim, keepdim=dim is not None)
    return norm


def local_values(tensor: Tensor) -> Tensor:
    """Return the dense tensor that stores the elements of `tensor` on this process; writing to it writes to `tensor`.

    Args:
        tensor: A strided, sparse (coalesced) or distributed tensor.

    Returns:
        The tensor itself, its stored values, or its local shard.
    """
    if isinstance(tensor, DTensor):
        shard = tensor.to_local()
        wait = getattr(shard, "wait", None)
        values: Tensor = wait() if wait is not None else shard
        return values
    if tensor.layout is torch.strided:
        return tensor
    return tensor.values()


def tensor_norms(tensors: Sequence[Tensor], order: float = 2.0) -> Tensor:
    """Return the norm of each tensor, accumulated in float32 or better; that of a finite tensor is finite.

    Args:
        tensors: Gradients of any shape, layout and floating or complex dtype; a distributed one counts as a whole.
        order: Order p of the norm, `math.inf` for the largest magnitude.

    Returns:
        Shape (len(tensors),), float32, or float64 where a tensor is double or its squares overflow float32.

    Example:
        >>> tensor_norms([torch.tensor([3.0, 4.0]), torch.zeros(0)])
        tensor([5., 0.])
    """
    values = [local_values(tensor) for tensor in tensors]
    norms = _reduce_over_shards(_norms_of_values(values, order), tensors, order)
    if (
        order != math.inf
        and norms.numel()
        and norms.dtype is torch.float32
        and bool(norms.isinf().any())
    ):
        # An infinite norm may only be squares that overflow: float64 holds the square of every float32.
        doubles = torch.stack([_norm_in_double(v, order) for v in values])
        return _reduce_over_shards(doubles, tensors, order)
    return norms


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
    if bool(total.isinf()) and norms.dtype is torch.float32:
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
    values = values if values.dtype in _EXACT else values.float()
    norms = vector_norm(values, 2, tuple(range(1, tensor.ndim)) if tensor.ndim > 1 else None)
    if isinstance(tensor, DTensor):
        dims = [d for d, p in enumerate(tensor.placements) if not isinstance(p, Replicate)]
        if tensor.ndim > 1:  # a shard along the first axis holds its units as a whole
            dims = [d for d in dims if getattr(tensor.placements[d], "dim", None) != 0]
        return _reduce(norms, tensor.device_mesh, dims, 2.0)
    return norms


def reduce_any(flags: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each flag whether it is set on any process that holds a part of the tensors.

    Args:
        flags: Flags of this process.
        tensors: What they were found on; without distributed ones they stay as they are.
    """
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    if not meshes:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.float32, device=next(iter(meshes)).device_type)
    for mesh in meshes:
        found = _reduce(found, mesh, range(mesh.ndim), math.inf)
    return [bool(flag) for flag in found.tolist()]


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


def _norms_of_values(values: Sequence[Tensor], order: float) -> Tensor:
    if not values:
        return torch.zeros(0)
    home = values[0].device
    dtype = torch.float64 if any(_is_double(v) for v in values) else torch.float32
    if order == math.inf:
        norms = [_largest_magnitude(v) for v in values]
    elif all(v.device == home and v.dtype in _EXACT for v in values):
        norms = list(torch._foreach_norm(list(values), order))
    else:
        norms = [_norm(v, order) for v in values]
    return torch.stack([n.to(device=home, dtype=dtype) for n in norms])


def _norm(values: Tensor, order: float) -> Tensor:
    if values.is_complex():
        values = torch.view_as_real(values) if order == 2 else values.abs()
    if values.dtype in _EXACT:
        return vector_norm(values, order)
    # Casting blocks that fit in the cache is many times faster than a norm that casts element by element.
    blocks = [vector_norm(block.float(), order) for block in values.reshape(-1).split(_BLOCK)]
    return (
        vector_norm(torch.stack(blocks), order)
        if blocks
        else values.new_zeros((), dtype=torch.float32)
    )


def _norm_in_double(values: Tensor, order: float) -> Tensor:
    magnitudes = values.abs() if values.is_complex() else values
    return vector_norm(magnitudes.double(), order)


def _largest_magnitude(values: Tensor) -> Tensor:
    if values.numel() == 0:
        return torch.zeros((), device=values.device)
    if values.is_complex():
        return values.abs().max()
    # Several times faster than the infinity norm on a CPU, and NaN passes through it.
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high)


def _is_double(values: Tensor) -> bool:
    return values.dtype in (torch.float64, torch.complex128)


def _reduce_over_shards(norms: Tensor, tensors: Sequence[Tensor], order: float) -> Tensor:
    """Combine the norms of local shards into norms of whole tensors: one collective a mesh dimension."""
    if not any(isinstance(tensor, DTensor) for tensor in tensors):
        return norms
    norms = norms.clone()
    for (mesh, dims), members in _sharded(tensors).items():
        norms[members] = _reduce(norms[members], mesh, dims, order)
    return norms


def _reduce(norms: Tensor, mesh: DeviceMesh, dims: Iterable[int], order: float) -> Tensor:
    """Return the norms of wholes from the norms of their parts along mesh dimensions."""
    largest = order == math.inf
    total = norms.clone() if largest else norms.double() ** order
    operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    for dim in dims:
        torch.distributed.all_reduce(total, operation, group=mesh.get_group(dim))
    return (total if largest else total ** (1 / order)).to(norms.dtype)


def _sharded(tensors: Sequence[Tensor]) -> dict[tuple[DeviceMesh, tuple[int, ...]], list[int]]:
    """Group the indices of distributed tensors by the mesh dimensions that they are sharded over."""
    found: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        if isinstance(tensor, DTensor):
            dims = tuple(
                d
                for d, placement in enumerate(tensor.placements)
                if not isinstance(placement, Replicate)
            )
            if dims:
                found.setdefault((tensor.device_mesh, dims), []).append(i)
    return found
