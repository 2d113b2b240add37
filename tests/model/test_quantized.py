"""Quantized weights apart from their model: applied, saved, reported."""

import copy
import warnings

import pytest
import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.artifact import ArtifactError
from clipquant.model.quantized import make_report


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 24, bias=False))
    net[2].weight = net[0].weight
    return net


def test_apply_to_gives_the_file_s_own_weights_and_the_model_itself(model, tmp_path):
    made = quantize(model, 3)
    other = copy.deepcopy(model)
    assert made.apply_to(other) is other
    stored = load_quantized(made.save(tmp_path / "a.safetensors"))
    assert stored.keys() == other.state_dict().keys()
    assert all(torch.equal(value, stored[key]) for key, value in other.state_dict().items())
    assert other[2].weight is other[0].weight


def test_a_model_that_does_not_fit_is_left_alone(model):
    other = nn.Sequential(nn.Linear(24, 24), nn.BatchNorm1d(24), nn.Linear(24, 5, bias=False))
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ArtifactError, match=r"2\.weight is \(24, 24\)"):
        quantize(model, 3).apply_to(other)
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_the_size_reported_is_that_of_the_file_whatever_is_known(model, tmp_path):
    made = quantize(model, 4)
    for known in ({}, {"seed": 7}, {"float_metrics": {"acc": 0.91}, "calibration": "3 batches"}):
        told = made.reported(**known)
        path = told.save(tmp_path / "a.safetensors")
        assert path.stat().st_size == told.report.size_bytes
        assert all(getattr(told.report, name) == value for name, value in known.items())


def test_tied_weights_count_once_in_the_float_size(model):
    report = make_report(quantize(model, 8).weights, model)
    once = {tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}
    assert report.float_bytes == sum(once.values())
    assert [layer.name for layer in report.layers] == ["0.weight"]


def test_a_file_larger_than_the_float_tensors_warns_with_both_figures(tmp_path):
    made = quantize(nn.Linear(8, 4), 4)
    said = r"has \d,?\d+ bytes, more than the 144 of the float tensors"
    with pytest.warns(UserWarning, match=said) as caught:
        made.save(tmp_path / "a")
    assert len(caught) == 1
    assert "times larger" in made.report.verdict


def test_a_smaller_file_does_not_warn(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize(nn.Linear(64, 64), 4).save(tmp_path / "a")
