"""What all rules with memory have in common: what tells nothing about the scale never enters their statistics."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from clipquant.clip import AdaGC, AutoClip, ZClip, clip_gradients_


@pytest.mark.parametrize("policy", ["propagate", "skip"])
@pytest.mark.parametrize("rule", [AutoClip(50), ZClip(warmup=3, max_norm=None), AdaGC(warmup=3)])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("when", [0, 2, 7])
def test_non_finite_norms_never_enter_the_statistics(
    rule: Any, bad: float, when: int, policy: Any
) -> None:
    norms = [1.0, 2.0, 1.5, 1.2, 8.0, 1.1, 9.0, 1.3, 1.2]
    states: list[Any] = []
    for sequence in (norms, [*norms[:when], bad, *norms[when:]]):
        state = None
        for norm in sequence:
            param = nn.Parameter(torch.zeros(2))
            param.grad = torch.tensor([0.6, 0.8]) * norm
            state = clip_gradients_(param, rule, state, on_nonfinite=policy).state or state
        states.append(state)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("rule", [AutoClip(10), ZClip(), ZClip(max_norm=None), AdaGC(warmup=25)])
def test_zero_norms_teach_nothing(rule: Any) -> None:
    states: list[Any] = []
    for norms in ([1.0, 2.0], [0.0] * 30 + [1.0] + [0.0] * 30 + [2.0]):
        state = None
        for norm in norms:
            param = nn.Parameter(torch.zeros(2))
            param.grad = torch.tensor([0.6, 0.8]) * norm
            state = clip_gradients_(param, rule, state).state
            assert not norm or float(param.grad.norm()) > 0
        states.append(state)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
