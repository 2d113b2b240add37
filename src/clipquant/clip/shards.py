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
    if type(tensor) is Tensor and tensor.layout is torch.strided:
        return tensor
    if isinstance(tensor, DTensor):
        shard = tensor.to_local()
        wait = getattr(shard, "wait", None)
        values: Tensor = wait() if wait is not None else shard
        return values
    return tensor if tensor.layout is torch.strided else tensor.values()


def reduce_norms(norms: Tensor, tensors: Sequence[Tensor], order: float) -> Tensor:
    """Return the norms of whole tensors from those of their local shards: one collective a mesh dimension.

    Args:
        norms: Shape (len(tensors),), norms of what this process holds.
        tensors: The tensors, plain or distributed.
        order: Order p of the norms.

    Returns:
        `norms` itself where nothing is sharded, else float64, the same on every process of a mesh.
    """
    if not any_distributed(tensors):
        return norms
    for (mesh, dims), members in _sharded(tensors).items():
        whole = reduce_parts(norms[members], mesh, dims, order)
        norms = norms.double().index_copy(0, torch.tensor(members, device=norms.device), whole)
    return norms


def reduce_parts(norms: Tensor, mesh: DeviceMesh, dims: Iterable[int], order: float) -> Tensor:
    """Return the norms of wholes, float64, from the norms of their parts along mesh dimensions."""
    if order == math.inf:
        # A maximum over processes may lose NaN, which therefore travels as a flag of its own.
        values = torch.stack(
            [norms.double().nan_to_num(nan=0.0, posinf=math.inf), norms.isnan().double()]
        )
        largest, is_nan = _all_reduce(values, mesh, dims, torch.distributed.ReduceOp.MAX)
        return torch.where(is_nan > 0, math.nan, largest)
    powers = norms.double() ** order
    total: Tensor = _all_reduce(powers, mesh, dims, torch.distributed.ReduceOp.SUM) ** (1 / order)
    return total


def _all_reduce(
    values: Tensor,
    mesh: DeviceMesh,
    dims: Iterable[int],
    operation: torch.distributed.ReduceOp.RedOpType,
) -> Tensor:
    for dim in dims:
        torch.distributed.all_reduce(values, operation, group=mesh.get_group(dim))
    return values


def reduce_any(flags: Sequence[bool], tensors: Sequence[Tensor]) -> list[bool]:
    """Return for each flag whether it is set on any process that holds a part of the tensors.

    Args:
        flags: Flags of this process.
        tensors: What they were found on; without distributed ones they stay as they are.
    """
    if not any_distributed(tensors):
        return list(flags)
    meshes = dict.fromkeys(tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor))
    found = torch.tensor(flags, dtype=torch.float32, device=next(iter(meshes)).device_type)
    for mesh in meshes:
        found = reduce_parts(found, mesh, range(mesh.ndim), math.inf)
    return [bool(flag) for flag in found.tolist()]


def reduce_together(
    flags: Sequence[bool], vectors: Sequence[Tensor], tensors: Sequence[Tensor], order: float
) -> tuple[list[bool], list[Tensor]] | None:
    """Return flags and norms of all processes by one collective for each mesh dimension.

    Args:
        flags: Flags of this process.
        vectors: Each of shape (len(tensors),), norms of what this process holds.
        tensors: The tensors, plain or distributed.
        order: Order p of the norms.

    Returns:
        What `reduce_any` and `reduce_norms` do in several; None where that is not enough, as nothing or not all of one
        mesh is sharded, or a maximum is asked for.
    """
    groups = list(_sharded(tensors).items())
    meshes = {tensor.device_mesh for tensor in tensors if isinstance(tensor, DTensor)}
    if order == math.inf or len(groups) != 1 or len(meshes) != 1:
        return None
    ((mesh, dims), members) = groups[0]
    if len(dims) != mesh.ndim:
        return None
    home = vectors[0].device if vectors else torch.device(mesh.device_type)
    index = torch.tensor(members, device="cpu").to(home)
    set_here = torch.tensor([float(flag) for flag in flags], device="cpu").to(home)
    powers = [set_here.double(), *(vector[index].double() ** order for vector in vectors)]
    total = _all_reduce(torch.cat(powers), mesh, dims, torch.distributed.ReduceOp.SUM)
    counts, *sums = total.split([len(flags), *[len(members)] * len(vectors)])
    wholes = [
        vector.double().index_copy(0, index, own ** (1 / order))
        for vector, own in zip(vectors, sums, strict=True)
    ]
    return [count > 0 for count in counts.tolist()], wholes


def sharded_dims(tensor: Tensor) -> tuple[int, ...]:
    """Return the mesh dimensions over which a tensor's elements are spread; none for a plain or replicated one."""
    if not isinstance(tensor, DTensor):
        return ()
    return tuple(d for d, p in enumerate(tensor.placements) if not isinstance(p, Replicate))


def any_distributed(tensors: Sequence[Tensor]) -> bool:
    """Return whether any of the tensors is a distributed one."""
    return any(issubclass(kind, DTensor) for kind in set(map(type, tensors)))


def _sharded(tensors: Sequence[Tensor]) -> dict[tuple[DeviceMesh, tuple[int, ...]], list[int]]:
    """Group the indices of distributed tensors by the mesh dimensions that they are sharded over."""
    found: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        dims = sharded_dims(tensor)
        if dims and isinstance(tensor, DTensor):
            found.setdefault((tensor.device_mesh, dims), []).append(i)
    return found
