"""Pieces of the gradients that fit in the cache, so that what reads them again reads no memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.clip.norms import norms_of_owners
from clipquant.clip.shards import local_values

_BLOCK = 1 << 21  # elements, 8 MB in float32
_SMALL = 1 << 16  # elements


@dataclass(frozen=True)
class Block:
    """Some whole gradients, or one part of a large one.

    Args:
        owners: Index of the gradient that each tensor belongs to.
        values: Dense tensors that share memory with the gradients.
    """

    owners: tuple[int, ...]
    values: tuple[Tensor, ...]


def blocks(tensors: Sequence[Tensor], split: bool = True) -> Iterator[Block]:
    """Yield all elements of the tensors, each once: small tensors together, large ones alone or in parts.

    Args:
        tensors: Gradients of any kind. Those that are not on a CPU come in one block.
        split: Whether a large tensor may come in parts.

    Example:
        >>> tensors = [torch.zeros(2), torch.zeros(3_000_000), torch.zeros(5)]
        >>> [block.owners for block in blocks(tensors)]
        [(0, 2), (1,), (1,)]
    """
    values = [local_values(tensor) for tensor in tensors]
    counts = [v.numel() if v.is_cpu else 0 for v in values]
    owners: list[int] = []
    filled = 0
    for i in sorted(range(len(values)), key=lambda i: counts[i] > _SMALL):
        if owners and filled + counts[i] > _BLOCK:
            yield Block(tuple(owners), tuple(values[owner] for owner in owners))
            owners, filled = [], 0
        if split and counts[i] > _BLOCK and values[i].is_contiguous():
            yield from (Block((i,), (part,)) for part in values[i].view(-1).split(_BLOCK))
        else:
            owners.append(i)
            filled += counts[i]
    if owners:
        yield Block(tuple(owners), tuple(values[owner] for owner in owners))


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
    norms = torch.cat([norms for _, norms in pieces]) if pieces else torch.zeros(0, device="cpu")
    if owners == list(range(count)):
        return norms
    if len(owners) == count and len(set(owners)) == count:  # one piece each, in another order
        return norms[sorted(range(count), key=owners.__getitem__)]
    return norms_of_owners(norms, torch.tensor(owners, device="cpu").to(norms.device), count, order)
