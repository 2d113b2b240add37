"""Fashion-MNIST from idx files, wherever they are."""

from __future__ import annotations

import gzip
import math
import os
import struct
from importlib.util import find_spec
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor
from torch.utils.data import DataLoader

from clipquant.errors import ArgumentError, MissingFileError
from clipquant.reference.images import (
    Batch,
    ByteImages,
    check_loader_settings,
    load_batches,
    split_stratified,
)

MEAN, STD = 0.2860, 0.3530
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


class FashionMNIST(LightningDataModule):
    """70,000 28x28 images of clothes (Xiao, Rasul and Vollgraf, 1708.07747): 60,000 to train, 10,000 to test.

    The files are taken from ``root`` where it is given; else from the Debian package ``dataset-fashion-mnist``; else
    from torchvision's download, where torchvision is installed.

    Args:
        root: folder of the four idx files, gzipped or not, itself or its subfolder ``FashionMNIST/raw``.
        batch_size: images in a training batch.
        eval_batch_size: images in a validation, test or prediction batch.
        val_size: images held out of the 60,000 for validation, stratified; 0: no validation, and all are trained on.
        num_workers: loader processes; 0 is the fastest, since a whole batch is one indexing of a tensor in memory.
        seed: seed of the split and of the training order.

    Raises:
        ValueError: where a batch size is below 1, ``num_workers`` negative, or ``val_size`` not in [0, 60,000).
        FileNotFoundError: from ``prepare_data`` and ``setup``, where the files are in none of the three places.

    Example:
        >>> FashionMNIST(batch_size=256, val_size=0).hparams["batch_size"]
        256
    """

    def __init__(
        self,
        root: str | None = None,
        batch_size: int = 128,
        eval_batch_size: int = 500,
        val_size: int = 5000,
        num_workers: int = 0,
        seed: int = 42,
    ) -> None:
        super().__init__()
        check_loader_settings(min(batch_size, eval_batch_size), num_workers)
        if not 0 <= val_size < 60_000:
            raise ArgumentError(
                f"val_size must be at least 0 and below the 60,000 training images, got {val_size}."
            )
        self.save_hyperparameters()
        self.root, self.val_size, self.seed = root, val_size, seed
        self.batch_size, self.eval_batch_size, self.num_workers = (
            batch_size,
            eval_batch_size,
            num_workers,
        )
        self.parts: list[ByteImages] = []

    def prepare_data(self) -> None:
        """Find the files, downloading them where that is the way left."""
        find_fashion_mnist(self.root)

    def setup(self, stage: str | None = None) -> None:
        """Read and split the images, once."""
        if self.parts:
            return
        images, labels, test_images, test_labels = (
            read_idx(path) for path in _list_files(find_fashion_mnist(self.root))
        )
        train = ByteImages(images.unsqueeze(1), labels.long(), MEAN, STD)
        sizes = [len(train) - self.val_size, self.val_size]
        self.parts = [
            train.subset(part) for part in split_stratified(train.labels, sizes, self.seed)
        ]
        self.parts.append(ByteImages(test_images.unsqueeze(1), test_labels.long(), MEAN, STD))

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the training images in an order that is new every epoch."""
        return load_batches(self.parts[0], self.batch_size, self.num_workers, self.seed)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the images held out for validation; none where ``val_size`` is 0."""
        if not self.val_size:
            return []
        return load_batches(self.parts[1], self.eval_batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the 10,000 test images."""
        return load_batches(self.parts[2], self.eval_batch_size, self.num_workers)

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return the 10,000 test images."""
        return self.test_dataloader()


def find_fashion_mnist(root: str | None = None) -> Path:
    """Return a folder that holds all four idx files of Fashion-MNIST, gzipped or not.

    Args:
        root: the folder to take, or one with a subfolder ``FashionMNIST/raw``; None: Debian's folder, else
            torchvision's download into ``$XDG_CACHE_HOME/clipquant``.

    Returns:
        The folder.

    Raises:
        FileNotFoundError: where it is nowhere; names the three ways to have it.
    """
    given = (
        [Path(root), Path(root) / "FashionMNIST" / "raw"] if root is not None else [DEBIAN_FOLDER]
    )
    for folder in given:
        if all(path.is_file() for path in _list_files(folder)):
            return folder
    if root is None and find_spec("torchvision") is not None:
        return _download_with_torchvision()
    raise MissingFileError(
        f"Fashion-MNIST needs the files {', '.join(FILES)}, each as it is or with .gz, and they are not all in "
        f"{' or '.join(map(str, given))}. Three ways: pass root=FOLDER with these files; "
        "apt-get install dataset-fashion-mnist; or pip install torchvision, which downloads them. "
        "The last two need root=None."
    )


def read_idx(path: Path) -> Tensor:
    """Read an idx file of unsigned bytes, gzipped where its name ends in .gz.

    Args:
        path: the file.

    Returns:
        uint8, of the shape that the file states.

    Raises:
        ValueError: where it is no such file, or holds more or fewer bytes than its header says.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if len(content) < 4 or content[:3] != b"\x00\x00\x08":
        raise ArgumentError(
            f"{path} is no idx file of unsigned bytes: it starts with {content[:4].hex() or 'nothing'}."
        )
    start = 4 + 4 * content[3]
    if len(content) < start:
        raise ArgumentError(
            f"{path} is damaged: its header of {start} bytes ends after {len(content)}."
        )
    shape = struct.unpack_from(f">{content[3]}I", content, 4)
    follow = len(content) - start
    if follow != math.prod(shape):
        raise ArgumentError(
            f"{path} is damaged: its header says shape {shape}, but {follow} bytes follow."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=start).reshape(shape)


def _list_files(folder: Path) -> list[Path]:
    plain = [folder / name for name in FILES]
    return [path if path.is_file() else path.with_name(path.name + ".gz") for path in plain]


def _download_with_torchvision() -> Path:
    from torchvision.datasets import FashionMNIST as Download

    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "clipquant"
    try:
        Download(str(root), download=True)
    except (OSError, RuntimeError) as error:
        raise MissingFileError(
            f"torchvision could not download Fashion-MNIST into {root} ({error}). Two other ways: pass root=FOLDER "
            f"with the files {', '.join(FILES)}; or apt-get install dataset-fashion-mnist."
        ) from error
    return root / "FashionMNIST" / "raw"
