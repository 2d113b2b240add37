"""Distributed tensors: what this process holds of them, and figures combined over all processes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate


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


def reduce_norms(norms: Tensor, tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norms of whole tensors from those of their local shards: one collective a mesh dimension.

    Args:
        norms: Shape (len(tensors),), norms of what this process holds.
        tensors: The tensors, plain or distributed.
        order: Order p of the norms.

    Returns:
        `norms` itself where nothing is sharded, else float64, the same on every process of a mesh.
    """
    for (mesh, dims), members in _sharded(tensors).items():
        whole = reduce_parts(norms[members], mesh, dims, order)
        norms = norms.double().index_copy(0, torch.tensor(members, device=norms.device), whole)
    return norms


def reduce_parts(norms: Tensor, mesh: DeviceMesh, dims: Iterable[int], order: float) -> Tensor:
    """Return the norms of wholes, float64, from the norms of their parts along mesh dimensions."""
    largest = order == math.inf
    total = norms.double().clone() if largest else norms.double() ** order
    operation = torch.distributed.ReduceOp.MAX if largest else torch.distributed.ReduceOp.SUM
    for dim in dims:
        torch.distributed.all_reduce(total, operation, group=mesh.get_group(dim))
    return total if largest else total ** (1 / order)


def reduce_any(flags: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each flag whether it is set on any process that holds a part of the tensors.

    Args:
        flags: Flags of this process.
        tensors: What they were found on; without distributed ones they stay as they are.
    """
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    if not meshes:
        return list(flags)
    found = torch.tensor(flags, dtype=torch.float32, device=next(iter(meshes)).device_type)
    for mesh in meshes:
        found = reduce_parts(found, mesh, range(mesh.ndim), math.inf)
    return [bool(flag) for flag in found.tolist()]


def sharded_dims(tensor: Tensor) -> tuple[int, ...]:
    """Return the mesh dimensions over which a tensor's elements are spread; none for a plain or replicated one."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(d for d, p in enumerate(tensor.placements) if not isinstance(p, Replicate))


def _sharded(tensors: Sequence[Tensor]) -> dict[tuple[DeviceMesh, tuple[int, ...]], list[int]]:
    """Group the indices of distributed tensors by the mesh dimensions that they are sharded over."""
    found: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        dims = sharded_dims(tensor)
        if dims and isinstance(tensor, DTensor):
            found.setdefault((tensor.device_mesh, dims), []).append(i)
    return found
