import pytest
import torch
from torch import nn

from clipquant.export.parts.blocks import FLOAT, INT8, blocks_of
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


def of_layer(layer, recipe, level=INT8):
    return blocks_of(quantize_weights(layer, recipe).tensors["weight"], level)


@pytest.mark.parametrize(
    ("layer", "recipe", "why"),
    [
        (nn.Linear(64, 8).half(), Recipe(4), "float16, not float32"),
        (nn.Conv1d(64, 8, 1), Recipe(4), "no matrix of outputs by inputs"),
        (nn.Linear(96, 8), Recipe(4, granularity=48), "groups of 48"),
    ],
)
def test_why_a_weight_has_no_such_form(layer, recipe, why):
    assert why in of_layer(layer, recipe)


def test_codes_scales_and_points_give_the_weight_back():
    torch.manual_seed(0)
    weights = quantize_weights(nn.Linear(40, 3), Recipe(4, granularity=32, method="rtn"))
    held = blocks_of(weights.tensors["weight"])
    codes = torch.stack([held.codes & 15, held.codes >> 4], -1).reshape(3, 2, 32).float()
    points = torch.stack([held.point & 15, held.point >> 4], -1).reshape(3, 2, 1).float()
    rest = 0 if held.rest is None else held.rest[..., None]
    found = (held.scale[..., None] * (codes - points) - rest).reshape(3, 64)[:, :40]
    assert torch.allclose(found, weights.state_dict()["weight"], atol=1e-6)


@pytest.mark.parametrize(
    ("level", "size", "bits"), [(INT8, 16, 4), (INT8, 32, 2), (FLOAT, 32, 4), (FLOAT, None, 4)]
)
def test_two_bits_take_four_where_the_runtime_has_no_quick_product(level, size, bits):
    assert of_layer(nn.Linear(64, 8), Recipe(2, granularity=size), level).bits == bits


@pytest.mark.parametrize(
    ("columns", "block"), [(2048, 256), (256, 256), (384, 128), (300, 128), (200, 256)]
)
def test_a_channels_scale_is_repeated_in_the_blocks_that_fill_up_least(columns, block):
    assert of_layer(nn.Linear(columns, 8), Recipe(4, granularity="channel")).block == block
