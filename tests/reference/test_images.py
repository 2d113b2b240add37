import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.reference.images import ByteImages, EpochShuffle, load_batches, split_stratified


def make_images(count=10):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return ByteImages(pixels, torch.arange(count), mean=0.25, std=0.5)


def test_batches_are_normalized_pixels():
    data = make_images()
    images, labels = data.__getitems__([3, 1])
    expected = (data.images[[3, 1]].double() / 255 - 0.25) / 0.5
    torch.testing.assert_close(images.double(), expected, rtol=1e-5, atol=1e-6)
    assert labels.tolist() == [3, 1]
    one, label = data[3]
    assert torch.equal(one, images[0])
    assert label == 3


def test_reading_does_not_change_the_images():
    data = make_images()
    before = data.images.clone()
    data.__getitems__(range(len(data)))
    assert torch.equal(data.images, before)


def test_every_image_comes_once_an_epoch_in_a_new_order():
    loader = load_batches(make_images(), batch_size=4, num_workers=0, seed=1)
    first = torch.cat([labels for _, labels in loader])
    loader.sampler.set_epoch(1)
    second = torch.cat([labels for _, labels in loader])
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(10))
    assert first.tolist() != second.tolist()


def test_an_epoch_has_the_same_order_after_a_restart():
    order = EpochShuffle(50, seed=3)
    order.set_epoch(4)
    again = EpochShuffle(50, seed=3)
    again.set_epoch(4)
    assert list(order) == list(again)
    assert list(order) != list(EpochShuffle(50, seed=4))


def test_workers_give_the_same_batches():
    plain, parallel = (load_batches(make_images(), 4, workers, seed=1) for workers in (0, 1))
    for (x, y), (a, b) in zip(plain, parallel, strict=True):
        assert torch.equal(x, a)
        assert torch.equal(y, b)


@given(
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=6),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=3),
    seed=st.integers(0, 100),
)
def test_split_is_disjoint_exact_and_stratified(counts, shares, seed):
    labels = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    total = len(labels)
    sizes = [int(share * total / len(shares)) for share in shares]
    parts = split_stratified(labels, sizes, seed)
    assert [len(part) for part in parts] == sizes
    joined = torch.cat(parts)
    assert len(joined.unique()) == len(joined)
    for part in parts:
        for label, count in enumerate(counts):
            # A part is a window of the items in the order of their rank within the class. It holds the
            # class's share of the window to within one item, and so do the other classes.
            share = len(part) * count / total
            assert (
                abs(int((labels[part] == label).sum()) - share) <= 1 + count * len(counts) / total
            )


def test_split_depends_on_the_seed_alone():
    labels = torch.arange(100) % 5
    first, again, other = (split_stratified(labels, [50, 50], seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("sizes", [[11], [5, 6], [-1, 4]])
def test_impossible_sizes_are_told(sizes):
    with pytest.raises(ValueError, match="at most 10 items"):
        split_stratified(torch.zeros(10, dtype=torch.long), sizes, seed=0)
