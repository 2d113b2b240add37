"""Which weights are named as likely harmed: by their own noise, or by their layer's outputs."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.artifact import read_artifact
from clipquant.quant.harm import MOST, harms
from clipquant.quant.methods import METHODS
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.report.stored import report_of


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)
    ).eval()


def with_outliers() -> nn.Module:
    """Return an encoder in which a few large weights cost all others their codes at one scale a channel."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 384), nn.GELU(), nn.Linear(384, 96)).eval()
    with torch.no_grad():
        model[2].weight[:, 5] *= 25
    return model


def said(model: nn.Module, **how):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = quantize(model, progress=False, **how)
    return made, [str(w.message) for w in caught if "likely harmed" in str(w.message)]


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_defaults_that_hold_are_silent(bits):
    for model in (net(), with_outliers()):
        made, warned = said(model, bits=bits)
        assert not warned
        assert not made.report.harmed
        assert "harmed" not in made.report.verdict


def test_a_scale_that_outliers_take_is_named_once_in_verdict_table_and_warning():
    made, warned = said(with_outliers(), bits=4, granularity="channel")
    assert made.report.harmed == ("2.weight",)
    assert "likely harmed: 2.weight; use 6 bits or groups" in made.report.verdict
    assert len(warned) == 1
    assert "2.weight" in warned[0]
    assert "dB SQNR" in {r.name: r.note for r in made.report.layers}["2.weight"]
    assert made.report.to_dict()["harmed"] == ["2.weight"]


def test_plain_rounding_to_2_bits_is_named_with_data_and_without():
    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    for how in ({}, {"data": data}, {"score": lambda _: 1.0}):
        made, warned = said(net(), bits=2, method="rtn", **how)
        assert len(warned) == 1
        assert made.report.harmed == ("0.weight", "3.weight")


def test_bits_chosen_by_a_size_are_judged_too_unless_the_metric_has_said_that_they_hold():
    torch.manual_seed(0)
    model, data = net(), [torch.randn(16, 3, 8, 8) for _ in range(8)]
    made, warned = said(model, bits="auto", data=data, max_size=2900)
    assert made.report.harmed, {r.name: (r.note, r.sqnr_db, r.rows) for r in made.report.layers}
    assert len(warned) == 1
    assert "allow more bytes" in warned[0]
    notes = {r.name: r.note for r in made.report.layers}
    rounded = made.apply_to(copy.deepcopy(model))
    x = torch.cat([data[3], data[7]])
    with torch.no_grad():
        wanted, off = model(x), rounded(x) - model(x)
    share = float((off - off.mean(0)).square().sum() / (wanted - wanted.mean(0)).square().sum())
    if "3.weight" in made.report.harmed:
        assert f"{100 * share:.0f} % error" in notes["3.weight"]
    held, warned = said(model, bits="auto", data=data, max_drop=0.5, score=lambda _: 1.0)
    assert held.report.budget.met
    assert not warned
    assert not held.report.harmed
    wide, warned = said(model, bits="auto", data=data, max_size=0.3)
    assert not wide.report.harmed


def test_outputs_are_measured_where_there_is_data():
    torch.manual_seed(1)
    model, data = net(), [torch.randn(16, 3, 8, 8) for _ in range(8)]
    weights = quantize_weights(model, Recipe(3), Calibration(data))
    rounded = copy.deepcopy(model)
    rounded.load_state_dict(weights.state_dict())
    x = torch.cat([data[3], data[7]])
    with torch.no_grad():
        wanted, off = model(x), rounded(x) - model(x)
    share = float((off - off.mean(0)).square().sum() / (wanted - wanted.mean(0)).square().sum())
    assert weights.errors["3.weight"] == pytest.approx(share, rel=1e-3)


def test_a_method_that_ruins_the_outputs_is_named_whatever_the_weights_look_like():
    class Shifted:
        name, needs_data = "shifted", True

        def solve(self, problem):
            found = METHODS["rtn"].solve(problem)
            for coded in found.codes.values():
                coded.codes.copy_(coded.codes.flip(1))
            return found

    data = [torch.randn(16, 3, 8, 8) for _ in range(4)]
    made, warned = said(net(), bits=6, method=Shifted(), data=data)
    assert len(warned) == 1
    assert "3.weight" in made.report.harmed


def test_the_file_still_says_so(tmp_path):
    made, _ = said(with_outliers(), bits=4, granularity="channel")
    path = made.save(tmp_path / "m.safetensors")
    load_quantized(path, with_outliers())
    artifact = read_artifact(path)
    report = report_of(artifact.weights, artifact.metadata, path.stat().st_size)
    assert report.harmed == ("2.weight",)
    assert report.verdict.endswith(made.report.warning)


def test_the_rule_asks_for_less_of_narrower_codes_and_never_for_more_than_16_db():
    assert not harms(3, 14.0)
    assert harms(3, 11.9)
    assert harms(8, 15.9)
    assert not harms(8, 16.1)
    assert not harms(2, 3.0, MOST)
    assert not harms(4, float("nan"))
