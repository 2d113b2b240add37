import gzip
import struct
import sys
import types

import pytest
import torch

from clipquant.reference import FashionMNIST
from clipquant.reference import fashion_mnist as module


def write_idx(path, values):
    header = struct.pack(f">4B{values.dim()}I", 0, 0, 8, values.dim(), *values.shape)
    content = header + values.numpy().tobytes()
    path.write_bytes(gzip.compress(content, 1) if path.suffix == ".gz" else content)


def write_data(folder, suffix="", train=60_000, test=10_000, size=2):
    """Write a stand-in of the real counts, with images of 2x2 pixels that tell their own number."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count in (("train", train), ("t10k", test)):
        numbers = torch.arange(count)
        pixels = torch.stack([numbers % 251, numbers // 251, numbers % 10, numbers % 7], dim=1).to(
            torch.uint8
        )
        write_idx(folder / f"{name}-images-idx3-ubyte{suffix}", pixels.reshape(count, size, size))
        write_idx(folder / f"{name}-labels-idx1-ubyte{suffix}", (numbers % 10).to(torch.uint8))


def forbid_torchvision(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)


@pytest.mark.parametrize(("suffix", "below"), [("", "."), (".gz", "."), ("", "FashionMNIST/raw")])
def test_any_folder_given_is_read(tmp_path, suffix, below):
    write_data(tmp_path / below, suffix)
    data = FashionMNIST(root=str(tmp_path))
    data.prepare_data()
    data.setup()
    assert [len(part) for part in data.parts] == [55_000, 5_000, 10_000]
    assert data.parts[1].labels.bincount().tolist() == [500] * 10
    numbers = torch.cat(
        [p.images[:, 0, 0, 0].long() + 251 * p.images[:, 0, 0, 1].long() for p in data.parts[:2]]
    )
    assert sorted(numbers.tolist()) == list(range(60_000))
    for part in data.parts:
        assert torch.equal(part.images[:, 0, 1, 0].long(), part.labels)


def test_without_validation_all_images_are_trained_on(tmp_path):
    write_data(tmp_path)
    data = FashionMNIST(root=str(tmp_path), val_size=0, batch_size=1000)
    data.setup()
    assert len(data.train_dataloader()) == 60
    assert data.val_dataloader() == []


def test_given_folder_without_the_files_is_told_and_nothing_else_tried(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNIST(root=str(tmp_path)).prepare_data()
    for words in (
        str(tmp_path),
        "root=",
        "dataset-fashion-mnist",
        "torchvision",
        "train-images-idx3-ubyte",
    ):
        assert words in str(caught.value)


def test_nowhere_names_all_three_ways(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "none")
    forbid_torchvision(monkeypatch)
    with pytest.raises(FileNotFoundError) as caught:
        FashionMNIST().setup()
    for words in (
        "root=FOLDER",
        "apt-get install dataset-fashion-mnist",
        "pip install torchvision",
    ):
        assert words in str(caught.value)


def test_debian_folder_is_taken_without_a_root(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path)
    forbid_torchvision(monkeypatch)
    write_data(tmp_path, ".gz")
    assert module.find_fashion_mnist() == tmp_path


@pytest.fixture
def torchvision(tmp_path, monkeypatch):
    """A stand-in of torchvision, whose download writes the files, or fails where ``error`` is set."""
    package, datasets = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.error = None

    def download(root, download):
        assert download
        if package.error:
            raise package.error
        write_data(module.Path(root) / "FashionMNIST" / "raw", train=100, test=100)

    datasets.FashionMNIST = download
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", datasets)
    monkeypatch.setattr(module, "find_spec", lambda name: package)
    monkeypatch.setattr(module, "DEBIAN_FOLDER", tmp_path / "none")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_torchvision_downloads_what_is_nowhere(tmp_path, torchvision):
    assert module.find_fashion_mnist() == tmp_path / "cache" / "clipquant" / "FashionMNIST" / "raw"


def test_failed_download_names_the_other_ways(torchvision):
    torchvision.error = RuntimeError("no route")
    with pytest.raises(FileNotFoundError, match=r"no route.*root=FOLDER.*dataset-fashion-mnist"):
        module.find_fashion_mnist()


def test_damaged_files_are_told(tmp_path):
    path = tmp_path / "file"
    write_idx(path, torch.zeros(3, 2, 2, dtype=torch.uint8))
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=r"shape \(3, 2, 2\), but 11 bytes"):
        module.read_idx(path)
    for wrong in (b"", b"PK\x03\x04", b"\x00\x00\x0d" + whole[3:]):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="no idx file"):
            module.read_idx(path)
    path.write_bytes(whole[:9])
    with pytest.raises(ValueError, match="damaged"):
        module.read_idx(path)


def test_real_images_where_debian_puts_them():
    if not module.DEBIAN_FOLDER.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    data = FashionMNIST(eval_batch_size=1000)
    data.setup()
    images, _ = next(iter(data.train_dataloader()))
    assert images.shape == (128, 1, 28, 28)
    assert data.parts[0].labels.bincount().tolist() == [5500] * 10
    pixels = torch.cat([images for images, _ in data.test_dataloader()])
    assert pixels.shape == (10_000, 1, 28, 28)
    assert abs(pixels.mean().item()) < 0.01
    assert abs(pixels.std().item() - 1) < 0.01


@pytest.mark.parametrize("settings", [{"val_size": 60_000}, {"val_size": -1}, {"batch_size": 0}])
def test_wrong_settings_are_told(settings):
    with pytest.raises(ValueError, match="got"):
        FashionMNIST(**settings)
