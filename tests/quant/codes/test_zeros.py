"""Weights pruned to zero stay zero on every grid that can hold one, and what is lost is counted."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from clipquant import quantize
from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import minmax_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.zeros import is_pruned, kept_zeros, lost_zeros, with_zero


def pruned(share=0.5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))
    for layer in (model[0], model[2]):
        prune.l1_unstructured(layer, "weight", share)
        prune.remove(layer, "weight")
    return model


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "gptq"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", 8])
def test_zeros_stay_zero_by_every_method(bits, method, granularity):
    model = pruned()
    data = [torch.randn(32, 16)] if method == "gptq" else None
    made = quantize(model, bits, method=method, granularity=granularity, data=data, progress=False)
    for name, value in model.state_dict().items():
        assert bool((made.state_dict()[name][value == 0] == 0).all()), name
    assert all("kept by a grid with an exact zero" in layer.note for layer in made.report.layers)


def test_zeros_stay_zero_where_rows_have_bits_of_their_own():
    model = pruned()
    made = quantize(model, "auto", max_size=3600, data=[torch.randn(64, 16)], progress=False)
    for name, value in model.state_dict().items():
        assert bool((made.state_dict()[name][value == 0] == 0).all()), name


def test_a_grid_without_a_zero_says_how_many_were_lost():
    model = pruned()
    made = quantize(model, 4, symmetric=False, method="rtn", progress=False)
    lost = sum(
        int(((value == 0) & (made.state_dict()[name] != 0)).sum())
        for name, value in model.state_dict().items()
    )
    said = [layer.note for layer in made.report.layers]
    assert lost > 0
    assert (
        sum(int(note.split()[1].replace(",", "")) for note in said if "zeros lost" in note) == lost
    )


def test_rows_without_zeros_are_left_as_they_are():
    matrix = torch.tensor([[0.0, -0.25, 1.2, 0.9], [0.3, 0.6, 1.0, 0.5]])
    coded = Coded.nearest(matrix, minmax_grid(matrix, QuantSpec(2)))
    kept = kept_zeros(coded, matrix)
    assert lost_zeros(coded, matrix) == 1
    assert lost_zeros(kept, matrix) == 0
    assert torch.equal(kept.values()[1], coded.values()[1])


def test_few_zeros_are_no_pruning_and_a_grid_of_two_values_has_no_room():
    assert not is_pruned(torch.cat([torch.zeros(1), torch.ones(99)]))
    assert with_zero(QuantSpec(1)) == QuantSpec(1)
