"""Images kept as bytes, handed out in float batches by an ordinary DataLoader."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from clipquant.errors import ArgumentError

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ByteImages(Dataset[Batch]):
    """Images in 8 bits with their labels; an index or a list of them gives normalized float32 images.

    A DataLoader asks for a whole batch at once (``__getitems__``), so no batch is collated image by image: that
    costs more than the network's own step on small images.

    Args:
        images: uint8 (N, C, H, W).
        labels: int64 (N,).
        mean: mean of the pixels in [0, 1], subtracted.
        std: their standard deviation, divided by.

    Example:
        >>> data = ByteImages(torch.full((3, 1, 2, 2), 255, dtype=torch.uint8), torch.arange(3), mean=0.5, std=0.5)
        >>> images, labels = data.__getitems__([2, 0])
        >>> images.shape, images.max().item(), labels.tolist()
        (torch.Size([2, 1, 2, 2]), 1.0, [2, 0])
    """

    images: Tensor
    labels: Tensor
    mean: float
    std: float

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> Batch:
        chosen = torch.as_tensor(indices)
        pixels = self.images[chosen].to(torch.float32)
        return pixels.sub_(255 * self.mean).div_(255 * self.std), self.labels[chosen]

    def subset(self, indices: Tensor) -> ByteImages:
        """Return the images at ``indices``, int64 (n,), in that order."""
        return ByteImages(self.images[indices], self.labels[indices], self.mean, self.std)


class EpochShuffle(Sampler[int]):
    """A new order every epoch that depends on the seed and the epoch alone, so that a resumed run sees the same one.

    Args:
        size: number of items.
        seed: seed of the order.

    Example:
        >>> order = EpochShuffle(5, seed=0)
        >>> first = list(order)
        >>> order.set_epoch(1)
        >>> sorted(first), list(order) == first
        ([0, 1, 2, 3, 4], False)
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed, self.epoch = size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch's order; Lightning calls this at the start of each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(torch.randperm(self.size, generator=generator).tolist())


def load_batches(
    data: ByteImages, batch_size: int, num_workers: int, seed: int | None = None
) -> DataLoader[Batch]:
    """Return a DataLoader of (images, labels); in order without a seed, shuffled anew each epoch with one."""
    return DataLoader(
        data,
        batch_size=batch_size,
        sampler=None if seed is None else EpochShuffle(len(data), seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        collate_fn=_keep_batch,
    )


def _keep_batch(batch: Any) -> Any:
    return batch


def split_stratified(labels: Tensor, sizes: Sequence[int], seed: int) -> list[Tensor]:
    """Split item numbers at random into parts of exactly these sizes, each with the classes' shares of the whole.

    Every item gets its rank within its class, as a fraction; cutting the order of these fractions gives each part
    its share of each class, up to the items at the two cuts. The order within a part is random too.

    Args:
        labels: int64 (N,), the class of each item.
        sizes: number of items in each part; their sum is at most N.
        seed: seed of the split.

    Returns:
        One int64 tensor of item numbers a part, disjoint.

    Raises:
        ValueError: where ``sizes`` holds a negative number or sums to more than N.

    Example:
        >>> labels = torch.tensor([0] * 6 + [1] * 4)
        >>> train, val = split_stratified(labels, [5, 5], seed=0)
        >>> labels[train].bincount().tolist(), labels[val].bincount().tolist()
        ([3, 2], [3, 2])
    """
    if min(sizes) < 0 or sum(sizes) > len(labels):
        raise ArgumentError(
            f"sizes must be at least 0 and sum to at most {len(labels)} items, got {list(sizes)}."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    fraction = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        members = order[labels[order] == label]
        fraction[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
    ranked = order[fraction[order].argsort(stable=True)][: sum(sizes)]
    return [
        part[torch.randperm(len(part), generator=generator)] for part in ranked.split(list(sizes))
    ]


def check_loader_settings(batch_size: int, num_workers: int) -> None:
    """Raise ValueError where a batch would be empty or the number of workers is negative."""
    if batch_size < 1:
        raise ArgumentError(f"batch_size must be at least 1, got {batch_size}.")
    if num_workers < 0:
        raise ArgumentError(f"num_workers must be 0 (no extra process) or more, got {num_workers}.")
