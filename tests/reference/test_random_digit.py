import pytest
import torch

from clipquant.reference import RandomDigit


def test_the_same_noise_at_every_step():
    batches = list(RandomDigit(steps=5, target=3).train_dataloader())
    assert len(batches) == 5
    for image, target in batches:
        assert torch.equal(image, batches[0][0])
        assert image.shape == (1, 1, 28, 28)
        assert image.dtype == torch.float32
        assert target.tolist() == [3]
    assert 0.9 < batches[0][0].std() < 1.1


def test_seed_decides_the_image():
    assert torch.equal(RandomDigit(seed=1).image, RandomDigit(seed=1).image)
    assert not torch.equal(RandomDigit(seed=1).image, RandomDigit(seed=2).image)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"target": -1}])
def test_wrong_settings_are_told(settings):
    with pytest.raises(ValueError, match="got"):
        RandomDigit(**settings)
