"""AutoClip against numpy's percentiles."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.clip import AutoClip, clip_gradients_

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
