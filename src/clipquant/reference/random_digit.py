"""One random image, over and over: data for a smoke run that needs no file."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from clipquant.errors import ArgumentError

Batch = tuple[Tensor, Tensor]


class RandomDigit(LightningDataModule):
    """One image of standard normal noise, ``randn(1, 1, 28, 28)``, with one target; the same at every step.

    Args:
        steps: batches in a training epoch; validation and test see the image once.
        target: the class to learn, from 0 up.
        seed: seed of the image.

    Raises:
        ValueError: where ``steps`` is below 1 or ``target`` negative.

    Example:
        >>> image, target = next(iter(RandomDigit().val_dataloader()))
        >>> image.shape, target.tolist(), len(RandomDigit(steps=7).train_dataloader())
        (torch.Size([1, 1, 28, 28]), [9], 7)
    """

    def __init__(self, steps: int = 100, target: int = 9, seed: int = 0) -> None:
        super().__init__()
        if steps < 1 or target < 0:
            raise ArgumentError(
                f"steps must be at least 1 and target at least 0, got steps={steps}, target={target}."
            )
        self.save_hyperparameters()
        self.steps = steps
        self.image = torch.randn(1, 1, 28, 28, generator=torch.Generator().manual_seed(seed))
        self.target = torch.tensor([target])

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the one batch, ``steps`` times."""
        return self._repeat(self.steps)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the one batch, once."""
        return self._repeat(1)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the one batch, once."""
        return self._repeat(1)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the one batch, once."""
        return self._repeat(1)

    def _repeat(self, steps: int) -> DataLoader[Batch]:
        batches: list[Batch] = [(self.image, self.target)] * steps
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]  # a list is a map-style data set
