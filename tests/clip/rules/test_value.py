"""Value against torch, bit for bit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import Value, clip_gradients_

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


@given(SHAPES, SEEDS, st.floats(0, 3))
def test_value_equals_clamp_bit_for_bit(shapes: list[list[int]], seed: int, limit: float) -> None:
    params = parameters(shapes, seed)
    expected = [g.clamp_(-limit, limit) for g in gradients(params)]
    clip_gradients_(params, Value(limit))
    assert all(torch.equal(p.grad, e) for p, e in zip(params, expected, strict=True))
