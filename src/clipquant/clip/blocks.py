"""Pieces of the gradients that fit in the cache, so that what reads them again reads no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.norms import norms_of_owners
from clipquant.clip.shards import local_values

_BLOCK = 1 << 20  # elements, 4 MB in float32


@dataclass(frozen=True)
class Block:
    """Some whole gradients, or one part of a large one.

    Args:
        owners: Index of the gradient that each tensor belongs to, ascending.
        values: Dense tensors that share memory with the gradients.
    """

    owners: tuple[int, ...]
    values: tuple[Tensor, ...]


def blocks(tensors: Sequence[Tensor], split: bool = True) -> Iterator[Block]:
    """Yield all elements of the tensors, each once, in order; on another device than a CPU in one block.

    Args:
        tensors: Gradients of any kind on one device.
        split: Whether a large tensor may come in parts.

    Example:
        >>> [block.owners for block in blocks([torch.zeros(2), torch.zeros(3_000_000)])]
        [(0,), (1,), (1,), (1,)]
    """
    owners: list[int] = []
    values: list[Tensor] = []
    size = 0
    for i, tensor in enumerate(tensors):
        local = local_values(tensor)
        count = local.numel() if local.is_cpu else 0
        if owners and size + count > _BLOCK:
            yield Block(tuple(owners), tuple(values))
            owners, values, size = [], [], 0
        if split and count > _BLOCK and local.is_contiguous():
            yield from (Block((i,), (part,)) for part in local.view(-1).split(_BLOCK))
        else:
            owners.append(i)
            values.append(local)
            size += count
    if owners:
        yield Block(tuple(owners), tuple(values))


def gather_norms(pieces: Sequence[tuple[Block, Tensor]], count: int, order: float) -> Tensor:
    """Return the norm of each gradient from the norms of its pieces.

    Args:
        pieces: Blocks, and the norm of each of their tensors.
        count: Number of gradients.
        order: Order of the norms.

    Returns:
        Shape (count,).
    """
    owners = [owner for block, _ in pieces for owner in block.owners]
    norms = torch.cat([norms for _, norms in pieces]) if pieces else torch.zeros(0)
    if owners == list(range(count)):
        return norms
    return norms_of_owners(norms, torch.tensor(owners, device=norms.device), count, order)
