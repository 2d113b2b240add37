"""Plain rounding through the whole-model entry: the reference formula, layer kind by layer kind."""

import pytest
import torch
from torch import nn

from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

LAYERS = {
    "linear": nn.Linear(9, 5),
    "conv": nn.Conv2d(3, 4, 3),
    "up": nn.ConvTranspose1d(4, 6, 3, groups=2),
    "embedding": nn.Embedding(7, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(("bits", "levels"), [(8, 8), (8, None), (4, None), (1, None)])
def test_codes_and_values_are_those_of_the_formula(kind, bits, levels):
    layer = LAYERS[kind]
    recipe = Recipe(bits, levels, False, "tensor", "rtn")
    tensor = quantize_weights(layer, recipe).tensors["weight"]
    weight = layer.weight.detach().double()
    low, high, steps = weight.min(), weight.max(), levels or 2**bits - 1
    codes = ((weight - low) / (high - low) * steps).round()
    restored = low + codes * (high - low) / steps
    folded = tensor.layout.fold(codes.to(torch.uint8))
    assert torch.equal(tensor.codes, folded)
    values = tensor.layout.unfold(tensor.coded.values()).double()
    assert torch.allclose(values, restored, atol=1e-6)
