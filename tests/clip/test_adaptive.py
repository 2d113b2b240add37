"""Rules with memory against their papers' formulas, re-derived here in plain Python floats."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.clip import AdaGC, AutoClip, ZClip, clip_gradients_

NORMS = st.lists(st.floats(0.01, 100.0), min_size=1, max_size=60)


def clipped_norms(rule: Any, norms: list[float]) -> list[float]:
    """Return the norms after clipping gradients of the given norms one after the other."""
    state, result = None, []
    for norm in norms:
        param = nn.Parameter(torch.zeros(2, dtype=torch.float64))
        param.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * norm
        state = clip_gradients_(param, rule, state).state
        result.append(float(param.grad.norm()))
    return result


@given(NORMS, st.floats(1, 100), st.integers(1, 20))
def test_autoclip_limits_to_the_percentile_of_the_history(
    norms: list[float], percentile: float, window: int
) -> None:
    expected = []
    for t, norm in enumerate(norms):
        history = norms[: t + 1][-window:]
        expected.append(min(norm, float(np.percentile(history, percentile))))
    assert clipped_norms(AutoClip(percentile, window), norms) == pytest.approx(expected, rel=1e-5)


def zclip_reference(
    norms: list[float], z: float, alpha: float, warmup: int, max_norm: float | None
) -> list[float]:
    """Section 3 of arXiv 2504.02507: EMA of mean and variance, reciprocal clipping of spikes."""
    mean = variance = 0.0
    result = []
    for t, g in enumerate(norms):
        target = g
        if t >= warmup:
            sigma = math.sqrt(variance)
            score = (g - mean) / (sigma + 1e-6)
            if score > z:
                target = mean + z * z / score * sigma
            mean = alpha * mean + (1 - alpha) * target
            variance = alpha * variance + (1 - alpha) * (target - mean) ** 2
        elif t == warmup - 1:
            mean = sum(norms[:warmup]) / warmup
            variance = sum((n - mean) ** 2 for n in norms[:warmup]) / warmup
        result.append(target if max_norm is None else min(target, max_norm))
    return result


@given(
    NORMS,
    st.floats(0.5, 3),
    st.floats(0.5, 0.99),
    st.integers(1, 25),
    st.sampled_from([None, 1.0, 50.0]),
)
def test_zclip_equals_its_paper(
    norms: list[float], z: float, decay: float, warmup: int, limit: float | None
) -> None:
    expected = zclip_reference(norms, z, decay, warmup, limit)
    assert clipped_norms(ZClip(z, decay, warmup, limit), norms) == pytest.approx(
        expected, rel=1e-6, abs=1e-9
    )


def adagc_reference(
    steps: list[list[float]], ratio: float, beta: float, warmup: int, limit: float
) -> list[list[float]]:
    """Algorithm 1 of arXiv 2502.11034."""
    gamma = [math.inf] * len(steps[0])
    result = []
    for t, norms in enumerate(steps):
        total = math.sqrt(sum(n * n for n in norms))
        row = []
        for i, norm in enumerate(norms):
            factor = min(limit / total, 1.0) if t < warmup else min(ratio * gamma[i] / norm, 1.0)
            clipped = factor * norm
            gamma[i] = (
                min(gamma[i], clipped) if t < warmup else beta * gamma[i] + (1 - beta) * clipped
            )
            row.append(clipped)
        result.append(row)
    return result


@given(
    st.lists(st.lists(st.floats(0.01, 100), min_size=3, max_size=3), min_size=1, max_size=30),
    st.floats(1.0, 1.5),
    st.floats(0.5, 0.99),
    st.integers(1, 10),
)
def test_adagc_equals_its_paper(
    steps: list[list[float]], ratio: float, decay: float, warmup: int
) -> None:
    expected = adagc_reference(steps, ratio, decay, warmup, 1.0)
    state = None
    for norms, row in zip(steps, expected, strict=True):
        params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in norms]
        for param, norm in zip(params, norms, strict=True):
            param.grad = torch.tensor([0.6, -0.8], dtype=torch.float64) * norm
        state = clip_gradients_(params, AdaGC(ratio, decay, warmup, 1.0), state).state
        assert [float(p.grad.norm()) for p in params] == pytest.approx(row, rel=1e-6)


def test_adagc_knows_a_parameter_whose_gradient_comes_late_or_is_zero_at_first() -> None:
    params = [nn.Parameter(torch.zeros(1)) for _ in range(3)]
    rule, state = AdaGC(warmup=2), None
    for step in range(6):
        params[0].grad = torch.tensor([0.1])
        params[1].grad = None if step < 4 else torch.tensor([0.2])
        params[2].grad = torch.tensor([0.0 if step < 3 else 0.3])
        state = clip_gradients_(params, rule, state).state
    assert [float(p.grad) for p in params] == pytest.approx([0.1, 0.2, 0.3])
    params[1].grad = torch.tensor([20.0])
    clip_gradients_(params, rule, state)
    assert float(params[1].grad) == pytest.approx(1.05 * 0.2)


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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AutoClip(0.0), "AutoClip: percentile must be a number > 0, got 0.0"),
        (lambda: AutoClip(101), "AutoClip: percentile must be at most 100, got 101"),
        (lambda: AutoClip(10, 0), "AutoClip: window must be a whole number >= 1, got 0"),
        (lambda: ZClip(-1.0), "ZClip: z must be a number > 0, got -1.0"),
        (lambda: ZClip(decay=1.0), "ZClip: decay must be below 1, got 1.0"),
        (lambda: ZClip(max_norm=0.0), "ZClip: max_norm must be a number > 0, got 0.0"),
        (lambda: AdaGC(decay=-0.1), "AdaGC: decay must be a number >= 0, got -0.1"),
        (lambda: AdaGC(warmup=2.5), "AdaGC: warmup must be a whole number >= 1, got 2.5"),
    ],
)
def test_values_out_of_range_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError) as error:
        make()
    assert message in str(error.value)
