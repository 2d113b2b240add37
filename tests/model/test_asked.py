"""Typical slips in what `quantize` is given: each is told with its remedy, or taken as it was meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipquant import QuantizeOnFitEnd, quantize
from clipquant.errors import ArgumentError, ArgumentTypeError, RunError


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (nn.Linear, r"got the class Linear\. Pass an instance: Linear\(\.\.\.\)"),
        (net().state_dict(), "got a state dict of 4 entries.*load_state_dict"),
        ("model.ckpt", "got the text 'model.ckpt'"),
        (torch.ones(3), "got Tensor"),
        (None, "got NoneType"),
    ],
)
def test_what_is_no_module_is_named(model: Any, said: str) -> None:
    with pytest.raises(ArgumentTypeError, match=f"(?s)quantize takes a module; {said}"):
        quantize(model)


@pytest.mark.parametrize(
    ("given", "meant"), [("GPTQ", "gptq"), ("Ada-Round", "adaround"), ("gtpq", "gptq")]
)
def test_a_method_in_another_spelling_is_named(given: str, meant: str) -> None:
    for ask in (
        lambda: QuantizeOnFitEnd(4, method=given),
        lambda: quantize(net(), 4, method=given),
    ):
        with pytest.raises(ArgumentError, match=f"method={given!r} .*did you mean {meant!r}"):
            ask()


def test_one_tensor_is_one_batch() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    one, listed = quantize(net(), 3, data=x), quantize(net(), 3, data=[x])
    assert all(torch.equal(v, listed.state_dict()[k]) for k, v in one.state_dict().items())
    rows = quantize(net(), 3, data=list(x.unsqueeze(1)))
    assert any(not torch.equal(v, rows.state_dict()[k]) for k, v in one.state_dict().items())


def test_one_dict_is_one_batch_of_keywords() -> None:
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(1))
    one, listed = quantize(net(), 3, data={"input": x}), quantize(net(), 3, data=[{"input": x}])
    assert all(torch.equal(v, listed.state_dict()[k]) for k, v in one.state_dict().items())


@pytest.mark.parametrize("data", ["train.csv", 3])
def test_what_holds_no_batches_is_named(data: Any) -> None:
    with pytest.raises(ArgumentTypeError, match="data must be an iterable of batches"):
        quantize(net(), 3, data=data)


def test_what_quantize_gives_prints_as_a_few_lines() -> None:
    made = quantize(net(), 4)
    assert len(repr(made).splitlines()) < 8
    assert "smaller" in repr(made)
    assert "<table>" in made._repr_html_()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bits": "8"}, "Leave out the quotes"),
        ({"granularity": "64"}, "Leave out the quotes"),
        ({"symmetric": "yes"}, "symmetric must be true, false or None.*'yes'"),
        ({"include": "fc*"}, r"include must be a list of globs.*Write \['fc\*'\]"),
        ({"exclude": "fc*"}, r"exclude must be a list of globs.*Write \['fc\*'\]"),
        ({"exclude": 3}, "exclude must be a list of globs.*got 3"),
        ({"overrides": ["fc*"]}, r"Write a dict such as"),
        ({"overrides": {"fc*": 9}}, r"overrides\['fc\*'\]: bits must be"),
    ],
)
def test_a_setting_of_the_wrong_kind_is_named_by_both_doors(given: Any, said: str) -> None:
    with pytest.raises(ArgumentError, match=said):
        quantize(nn.Linear(8, 8), **given)
    with pytest.raises(ArgumentError, match=said):
        QuantizeOnFitEnd(**given)


@pytest.mark.parametrize("value", ["a", None, [1, 2]])
def test_a_score_that_is_no_number_is_named(value: Any) -> None:
    with pytest.raises(RunError, match="score must return a number, higher is better; got"):
        quantize(nn.Linear(8, 8), 8, score=lambda model: value)


def test_a_budget_that_bounds_nothing_is_warned_of() -> None:
    data = [torch.randn(16, 32)]
    with pytest.warns(UserWarning, match="max_drop=5 lets score fall from 0.9 to nothing"):
        quantize(nn.Linear(32, 64), "auto", max_drop=5, data=data, score=lambda model: 0.9)
