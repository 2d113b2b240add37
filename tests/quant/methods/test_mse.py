"""The range of least squared error: no other range of the search does better."""

import pytest
import torch
from torch import nn

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import SHRINK, shrunk_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("granularity", ["channel", "tensor", 16])
def test_no_other_range_does_better(bits, granularity):
    torch.manual_seed(bits)
    layer = nn.Linear(64, 8)
    layer.weight.data = torch.distributions.StudentT(3.0).sample((8, 64))
    recipe = Recipe(bits, symmetric=False, granularity=granularity, method="mse")
    tensor = quantize_weights(layer, recipe).tensors["weight"]
    weight = layer.weight.detach()
    error = (tensor.coded.values() - weight).square().sum()
    spec = QuantSpec(bits, symmetric=False, granularity=granularity)
    others = [
        (Coded.nearest(weight, shrunk_grid(weight, spec, share)).values() - weight).square().sum()
        for share in SHRINK
    ]
    assert tensor.method == "mse"
    assert error <= min(others) * 1.001
