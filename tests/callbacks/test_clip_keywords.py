"""Guesses at what the callback's arguments are called: each error names what was given and what to give."""

from __future__ import annotations

import inspect
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from clipquant import GradientClipCallback, clip_gradients_
from clipquant.clip import Norm, Value
from clipquant.errors import ClipquantError


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"max_norm": 1.0}, r"no argument max_norm=1.0: .* give Norm\(1.0\)"),
        ({"norm": 2}, r"no argument norm=2: .* give Norm\(2\)"),
        ({"clip_val": 0.5}, r"clip_val=0.5: .*Norm\(0.5\) .* or Value\(0.5\)"),
        ({"gradient_clip_val": 0.5}, r"Norm\(0.5\) .* or Value\(0.5\)"),
        ({"clip_value": 0.1}, r"give Value\(0.1\)"),
        ({"clip_factor": 0.01}, r"give AGC\(0.01\)"),
        ({"norm_type": 1.0}, r"give Norm\(1.0, norm_type=1.0\)"),
        ({"rule": Norm(1.0), "max_norm": 1.0}, r"give Norm\(1.0\)"),
        ({"on_nonfinit": "zero"}, "give on_nonfinite='zero'"),
        ({"exclud": ["*.bias"]}, r"give exclude=\['\*.bias'\]"),
        ({"qqq": 1}, "its arguments are rule, on_nonfinite, .*log"),
    ],
)
def test_unknown_keywords_are_told_what_the_same_is_called_here(
    keywords: dict[str, Any], said: str
) -> None:
    with pytest.raises(TypeError, match=said) as caught:
        GradientClipCallback(**keywords)
    assert isinstance(caught.value, ClipquantError)


def test_the_signature_stays_and_so_does_pickling() -> None:
    assert list(inspect.signature(GradientClipCallback).parameters)[:2] == ["rule", "on_nonfinite"]
    again = pickle.loads(pickle.dumps(GradientClipCallback(Norm(1.0), exclude=["a"])))
    assert (again.rule, again.exclude) == (Norm(1.0), ["a"])


@pytest.mark.parametrize("zero", [0, 0.0, -0.0, np.float32(0)])
def test_the_number_zero_is_refused_with_both_readings(zero: Any) -> None:
    with pytest.raises(
        ValueError, match=r"got .*gradient_clip_val=0 .* leave .* out.*Value\(0.0\)"
    ):
        GradientClipCallback(zero)
    assert GradientClipCallback(Value(0.0)).rule == Value(0.0)  # says what it means


def test_outside_the_trainer_zero_clamps_to_zero() -> None:
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    clip_gradients_([weight], 0)
    assert not weight.grad.any()


@pytest.mark.parametrize("limit", [-1, -2.5])
def test_a_negative_limit_is_shown_as_it_was_received(limit: Any) -> None:
    with pytest.raises(ValueError, match=rf"limit must be a number >= 0, got {limit}:"):
        GradientClipCallback(limit)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0.3", r"got '0.3': drop the quotes and give 0.3, which means Value\(0.3\)"),
        ("1e-2", "drop the quotes and give 0.01"),
        ("Norm", r"got 'Norm': give the rule itself, e.g. Norm\(1.0\)"),
    ],
)
def test_a_rule_given_as_text(text: Any, said: str) -> None:
    for attempt in (GradientClipCallback, lambda rule: clip_gradients_([], rule)):
        with pytest.raises(TypeError, match=said) as caught:
            attempt(text)
        assert isinstance(caught.value, ClipquantError)
