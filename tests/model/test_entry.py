"""quantize() without a Trainer: the caller's model stays, what cannot go together is refused."""

import copy

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.errors import ArgumentError


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_the_model_is_not_touched_and_scores_are_those_of_copies(model):
    before = {key: value.clone() for key, value in model.state_dict().items()}
    seen = []

    def score(network):
        seen.append(network)
        return float(network[0].weight.detach().abs().sum())

    made = quantize(model, 2, score=score)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert seen[0] is model
    assert seen[1] is not model
    assert made.report.float_metrics == {"score": score(model)}
    applied = made.apply_to(copy.deepcopy(model))
    assert made.report.quantized_metrics == {"score": score(applied)}
    assert (made.report.monitor, made.report.mode) == ("score", "max")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"bits": 4, "max_size": 900}, "need bits='auto'.*got bits=4"),
        ({"bits": 4, "max_drop": 0.1}, "need bits='auto'"),
        ({"bits": "auto", "max_size": 900}, "data=None"),
        ({"bits": "auto", "max_size": 900, "data": [], "calibration_batches": 0}, "calibration_batches=0"),
        ({"bits": "auto"}, "needs max_drop or max_size"),
    ],
)  # fmt: skip
def test_budgets_bits_and_data_go_together(model, asked, said):
    with pytest.raises(ArgumentError, match=said):
        quantize(model, **asked)
