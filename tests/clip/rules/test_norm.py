"""Norm against torch, optax and its formula."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import Norm, clip_gradients_

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


@given(SHAPES, SEEDS, st.floats(0.01, 10), st.sampled_from([1.0, 2.0, 3.0, math.inf]))
def test_norm_equals_clip_grad_norm(
    shapes: list[list[int]], seed: int, limit: float, order: float
) -> None:
    shapes = [
        [*shape[:-1], shape[-1] + 1] if shape else shape for shape in shapes
    ]  # torch's inf norm needs elements
    shapes = [[max(1, n) for n in shape] for shape in shapes]
    ours, theirs = parameters(shapes, seed), parameters(shapes, seed)
    record = clip_gradients_(ours, Norm(limit, order))
    total = nn.utils.clip_grad_norm_(theirs, limit, order)
    assert record.grad_norm == pytest.approx(float(total), rel=1e-6)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@given(SHAPES, SEEDS)
def test_norm_with_nothing_to_clip_leaves_gradients_bit_for_bit(
    shapes: list[list[int]], seed: int
) -> None:
    params = parameters(shapes, seed)
    before = gradients(params)
    record = clip_gradients_(params, Norm(1e6))
    assert not record.clipped
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def test_norm_of_each_tensor_is_that_of_the_formula() -> None:
    params = parameters([[3, 4], [5], []], seed=3, scale=10.0)
    before = gradients(params)
    clip_gradients_(params, Norm(0.5, scope="tensor"))
    for param, grad in zip(params, before, strict=True):
        norm = math.sqrt(sum(v * v for v in grad.double().flatten().tolist()))
        torch.testing.assert_close(
            param.grad.double(), grad.double() * min(1.0, 0.5 / norm), rtol=1e-5, atol=1e-7
        )


def test_norm_of_each_group_is_that_of_torch_on_the_group() -> None:
    ours, theirs = (
        parameters([[3, 4], [5], [2, 2]], seed=4),
        parameters([[3, 4], [5], [2, 2]], seed=4),
    )
    clip_gradients_([{"params": ours[:2]}, {"params": ours[2:]}], Norm(0.3, scope="group"))
    nn.utils.clip_grad_norm_(theirs[:2], 0.3)
    nn.utils.clip_grad_norm_(theirs[2:], 0.3)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


def test_norm_warms_its_limit_up_linearly() -> None:
    rule, state, limits = Norm(1.0, warmup_steps=4, warmup_start=0.2), None, []
    for _ in range(6):
        (param,) = parameters([[10]], seed=5, scale=100.0)
        record = clip_gradients_(param, rule, state)
        state = record.state
        limits.append(float(param.grad.norm()))
    assert limits == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0], rel=1e-5)


@given(SHAPES, SEEDS, st.floats(0.01, 10))
def test_norm_equals_the_formula_of_optax(shapes: list[list[int]], seed: int, limit: float) -> None:
    params = parameters(shapes, seed)
    before = [g.double() for g in gradients(params)]
    total = math.sqrt(sum(float(g.square().sum()) for g in before))
    clip_gradients_(params, Norm(limit))
    for param, g in zip(params, before, strict=True):
        expected = g if total < limit else g / total * limit
        torch.testing.assert_close(param.grad.double(), expected, rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_an_infinite_limit_only_measures(policy: Any) -> None:
    params = parameters([[3, 4], [5]], 8, 1e6)
    before = gradients(params)
    record = clip_gradients_(params, Norm(math.inf), on_nonfinite=policy, measure=True)
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
    assert (record.clipped, record.clip_coef) == (False, 1.0)
    params[0].grad[0, 0] = math.inf
    before = gradients(params)
    clip_gradients_(params, Norm(math.inf))
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))


def test_a_limit_of_zero_zeroes_and_orders_below_one_hold() -> None:
    params = parameters([[3, 4]], 9)
    clip_gradients_(params, Norm(0.0))
    assert not params[0].grad.any()
    params = parameters([[3, 4], [5]], 9)
    clip_gradients_(params, Norm(2.0, 0.5))
    joined = torch.cat([p.grad.flatten() for p in params]).double()
    assert float(torch.linalg.vector_norm(joined, 0.5)) == pytest.approx(2.0, rel=1e-5)
