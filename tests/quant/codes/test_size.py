"""What codes take at least, against what they do take."""

import pytest
import torch
from torch import nn

from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.size import coded_bytes
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.report.layers import stored_bytes


@pytest.mark.parametrize("bits", [1, 3, 8])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_it_is_what_a_weight_takes_whose_scales_fit_float16(bits, granularity):
    torch.manual_seed(0)
    recipe = Recipe(bits, granularity=granularity, method="rtn", symmetric=False)
    tensor = quantize_weights(nn.Linear(9, 7), recipe).tensors["weight"]
    wide = tensor.scale.dtype.itemsize // 2  # a single scale for all is kept in float32
    scales = 2 * 2 * tensor.scale.numel()
    least = coded_bytes(Layout((7, 9)), recipe.spec)
    assert stored_bytes(tensor) == least + (wide - 1) * scales


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.bias_table = nn.Embedding(50, 1)
        self.fc = nn.Linear(8, 8)
        self.half = nn.Linear(3, 4).half()


def test_a_weight_that_would_take_more_bytes_stays_in_float_and_says_so():
    weights = quantize_weights(Net(), Recipe(8, symmetric=False))
    assert list(weights.tensors) == ["fc.weight"]
    said = {item.name: (item.bytes, item.why) for item in weights.left}
    assert said["bias_table.weight"] == (200, "would take more bytes as codes: 250 against 200")
    assert said["half.weight"] == (24, "would take more bytes as codes: 28 against 24")
    assert torch.equal(weights.floats["bias_table.weight"], Net().bias_table.weight)


def test_bits_given_by_an_override_are_obeyed():
    weights = quantize_weights(Net(), Recipe(8, overrides={"bias_table.*": 4}))
    assert weights.tensors["bias_table.weight"].bits == 4


def test_a_model_of_nothing_else_is_quantized_as_asked():
    assert list(quantize_weights(nn.Embedding(50, 1), Recipe(8)).tensors) == ["weight"]
