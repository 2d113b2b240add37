import pytest
import torch
from torch import nn

from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))


def test_the_model_is_not_touched_and_its_keys_are_kept():
    model = small()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = quantize_weights(model, Recipe(3)).state_dict()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert state.keys() == before.keys()
    assert all(state[k].dtype == before[k].dtype for k in state)
    small().load_state_dict(state, strict=True)


def test_the_float_tensors_are_copies():
    model = small()
    weights = quantize_weights(model)
    model[3].bias.data.add_(1)
    assert not torch.equal(weights.floats["3.bias"], model[3].bias)


def test_overrides_give_a_weight_its_own_bits_and_the_first_match_holds():
    weights = quantize_weights(small(), Recipe(8, overrides={"0.*": 4, "*": 2}))
    assert weights.tensors["0.weight"].bits == 4
    assert weights.tensors["3.weight"].bits == 2


def test_overrides_are_checked():
    with pytest.raises(ValueError, match="got 9"):
        quantize_weights(small(), Recipe(overrides={"0.weight": 9}))
    with pytest.raises(ValueError, match=r"overrides=\['fc'\] matches no parameter"):
        quantize_weights(small(), Recipe(overrides={"fc": 4}))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [{}, {"bits": 4}, {"levels": 8, "granularity": "tensor"}])
def test_weights_that_are_not_finite_are_refused_by_name(value, how):
    model = small()
    model[3].weight.data[0, :2] = value
    with pytest.raises(ValueError, match=r"3\.weight \(2 of 48\)"):
        quantize_weights(model, Recipe(**how))
