"""What shares a scale by default: a channel where it holds, groups where outliers would cost the rest its bits."""

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.quant.codes.granularity import GROUPS, fitting_granularity
from clipquant.quant.codes.spec import QuantSpec


def outliers(rows=16, columns=512):
    torch.manual_seed(0)
    matrix = torch.randn(rows, columns)
    matrix[:, ::97] *= 20
    return matrix


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
def test_normally_distributed_weights_keep_a_scale_a_channel(bits):
    torch.manual_seed(bits)
    for columns in (64, 700, 9000):
        assert fitting_granularity(torch.randn(32, columns), QuantSpec(bits)) == "channel"


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_outliers_get_groups_that_pay_for_their_scales(bits):
    matrix, spec = outliers(), QuantSpec(bits)
    size = fitting_granularity(matrix, spec)
    assert size in GROUPS
    layer = nn.Linear(matrix.shape[1], matrix.shape[0], bias=False)
    layer.weight.data = matrix
    errors = {}
    for granularity in ("channel", size):
        state = quantize(layer, bits, method="mse", granularity=granularity).state_dict()
        errors[granularity] = float((state["weight"] - matrix).square().sum())
    assert errors[size] * 4 ** (32 / size) < errors["channel"]


def test_wide_codes_fixed_steps_short_rows_and_damaged_weights_keep_the_channel():
    matrix = outliers()
    assert fitting_granularity(matrix, QuantSpec(8)) == "channel"
    assert fitting_granularity(matrix, QuantSpec(4, levels=8)) == "channel"
    assert fitting_granularity(matrix[:, :32], QuantSpec(4)) == "channel"
    assert fitting_granularity(matrix * torch.nan, QuantSpec(4)) == "channel"
    assert fitting_granularity(matrix * 0, QuantSpec(4)) == "channel"


def test_the_choice_is_made_a_weight_and_said():
    plain, odd = nn.Linear(512, 16), nn.Linear(512, 16)
    odd.weight.data = outliers()
    net = nn.Sequential(plain, odd)
    torch.nn.init.normal_(plain.weight)
    made = quantize(net, 4)
    sizes = {name: tensor.group_size for name, tensor in made.weights.tensors.items()}
    assert sizes["0.weight"] == 512
    assert sizes["1.weight"] in GROUPS
    assert f"a scale for every {sizes['1.weight']} weights" in made.weights.notes["1.weight"]
    assert "0.weight" not in made.weights.notes
    said = quantize(net, 4, granularity="channel")
    assert said.weights.tensors["1.weight"].group_size == 512
