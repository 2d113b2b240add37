"""Indicator against its definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import Indicator, clip_gradients_

SHAPES = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=5)


SEEDS = st.integers(0, 2**31 - 1)


def parameters(shapes: list[list[int]], seed: int, scale: float = 1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = scale * torch.randn(param.shape, generator=generator)
    return params


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@given(SHAPES, SEEDS, st.sampled_from([0.0, 0.5]))
def test_indicator_marks_elements_beyond_the_threshold(
    shapes: list[list[int]], seed: int, threshold: float
) -> None:
    params = parameters(shapes, seed)
    for param in params:
        param.grad[param.grad.abs() < 0.2] = 0.0
    expected = [
        torch.tensor([float(abs(v) > threshold) for v in g.flatten().tolist()])
        for g in gradients(params)
    ]
    record = clip_gradients_(params, Indicator(threshold), measure=True)
    for param, e in zip(params, expected, strict=True):
        assert torch.equal(param.grad.flatten(), e)
    count = sum(len(e) for e in expected)
    assert record.nonzero_share == pytest.approx(
        sum(float(e.sum()) for e in expected) / count if count else 0.0
    )
