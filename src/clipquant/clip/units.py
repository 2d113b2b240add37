"""Units of a tensor, such as the output channels of a weight: their norms, and how large those may be."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from clipquant.clip.norms import EXACT, vector_norm
from clipquant.clip.shards import local_values, reduce_parts, sharded_dims


@dataclass(frozen=True)
class UnitLimits:
    """The largest norm of each unit of a gradient: `ratio` times the norm of the weight's unit, at least `eps`.

    Args:
        ratio: Largest norm relative to the weight's.
        eps: What a weight's norm counts as at least.
        axis: Axis of tensors with two or more axes along which the units lie.
    """

    ratio: float
    eps: float
    axis: int = 0

    def coefficients(self, grad_norms: Tensor, weight_norms: Tensor) -> Tensor:
        """Return the factor of each unit: `min(1, ratio * max(|w|, eps) / max(|g|, 1e-6))`.

        Args:
            grad_norms: Norm of each unit of the gradient.
            weight_norms: Norm of each unit of the weight, same shape.

        Returns:
            Factors in [0, 1], same shape.
        """
        return self.of(weight_norms).div(grad_norms.clamp(min=1e-6)).clamp_(max=1.0)

    def of(self, weight_norms: Tensor) -> Tensor:
        """Return the limits of gradients whose weights have these norms."""
        return weight_norms.clamp(min=self.eps).mul_(self.ratio)


def front(tensor: Tensor, axis: int) -> Tensor:
    """Return a view of a tensor with two or more axes in which its units lie along the first; any other as it is."""
    return tensor if axis == 0 or tensor.ndim < 2 else tensor.movedim(axis, 0)


def unit_norms(tensor: Tensor, axis: int = 0) -> Tensor:
    """Return the 2-norm of each unit: of each slice along an axis, or of the whole tensor below two axes.

    Args:
        tensor: A strided or distributed tensor of any floating or complex dtype.
        axis: The axis along which the units lie.

    Returns:
        float32 (float64 for double), of a shape that multiplies `front(tensor, axis)`: (units, 1, ..., 1), or a scalar;
        of a distributed tensor the units of the local shard.

    Example:
        >>> unit_norms(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
        tensor([[5.],
                [2.]])
    """
    return units_of_all([tensor], axis)[0]


def units_of_all(tensors: Sequence[Tensor], axis: int = 0) -> list[Tensor]:
    """Return `unit_norms` of each tensor; of distributed ones by one collective for all that are laid out alike."""
    found = [_local_units(tensor, axis) for tensor in tensors]
    alike: dict[tuple[DeviceMesh, tuple[int, ...]], list[int]] = {}
    for i, tensor in enumerate(tensors):
        dims = _dims_within_units(tensor, axis)
        if dims and isinstance(tensor, DTensor):
            alike.setdefault((tensor.device_mesh, dims), []).append(i)
    for (mesh, dims), members in alike.items():
        parts = [found[i].double().reshape(-1) for i in members]
        whole = reduce_parts(torch.cat(parts), mesh, dims, 2.0)
        for i, own in zip(members, whole.split([part.numel() for part in parts]), strict=True):
            found[i] = own.view_as(found[i])
    return found


def _local_units(tensor: Tensor, axis: int) -> Tensor:
    """Return the norms of what this process holds of each unit."""
    values = front(local_values(tensor), axis)
    values = values.abs() if values.is_complex() else values
    values = values if values.dtype in EXACT else values.float()
    norms = _kept_norms(values, tensor.ndim)
    if math.inf in norms.flatten().tolist():
        norms = _kept_norms(values.double(), tensor.ndim)
    return norms


def _dims_within_units(tensor: Tensor, axis: int) -> tuple[int, ...]:
    """Return the mesh dimensions over which single units are spread."""
    dims = sharded_dims(tensor)
    if not dims or tensor.ndim < 2 or not isinstance(tensor, DTensor):
        return dims
    own = axis % tensor.ndim  # a shard along the units' axis holds its units as a whole
    return tuple(d for d in dims if getattr(tensor.placements[d], "dim", None) != own)


def _kept_norms(values: Tensor, ndim: int) -> Tensor:
    """Return the norms of units in the shape that multiplies `values`."""
    if ndim < 2:
        return vector_norm(values, 2)
    return row_norms(values).view(-1, *[1] * (ndim - 1))


def row_norms(values: Tensor) -> Tensor:
    """Return the 2-norm of each slice along the first axis as a vector."""
    if values.numel() and values.is_contiguous():  # a matrix takes half the time
        values = values if values.ndim == 2 else values.view(len(values), -1)
        norms: Tensor = torch.linalg.vector_norm(values, 2, dim=1)
        return norms
    return vector_norm(values, 2, tuple(range(1, values.ndim))).view(-1)
