"""AdaGC against its paper, re-derived in plain Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.clip import AdaGC, clip_gradients_


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
