"""ZClip against its paper, re-derived in plain Python floats."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.clip import ZClip, clip_gradients_

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
