"""Fake quantization: stored values on the way forward, the gradients of the papers on the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.training.fake import FakeQuantize


def lsq(weight, scale, zero, top):
    """LSQ as its paper writes it: round and clamp, each passed straight through by detached differences."""
    place = weight / scale + zero
    clamped = place.clamp(0, top)
    codes = clamped + (clamped.round() - clamped).detach()
    return (codes - zero) * scale


@given(st.integers(0, 1000), st.integers(1, 15))
def test_gradients_of_the_grid_are_those_of_lsq(seed, top):
    generator = torch.Generator().manual_seed(seed)
    weight = 3 * torch.randn(4, 2, 5, generator=generator, dtype=torch.float64)
    scale = torch.rand(4, 2, 1, generator=generator, dtype=torch.float64) + 0.1
    zero = top * torch.rand(4, 2, 1, generator=generator, dtype=torch.float64)
    slope = torch.randn(4, 2, 5, generator=generator, dtype=torch.float64)
    found = []
    for function in (lambda *a: FakeQuantize.apply(*a, top), lambda *a: lsq(*a, top)):
        leaves = [t.clone().requires_grad_(True) for t in (weight, scale, zero)]
        value = function(*leaves)
        found.append((value, *torch.autograd.grad(value, leaves, slope)))
    for own, reference in zip(
        found[0][:1] + found[0][2:], found[1][:1] + found[1][2:], strict=True
    ):
        torch.testing.assert_close(own, reference)


def test_a_weight_takes_the_gradient_of_its_value_but_not_further_out():
    weight = torch.tensor([-5.0, -0.4, 0.3, 1.4, 5.0], requires_grad=True)
    grid = torch.tensor(1.0), torch.tensor(0.0), 1
    for sign in (1.0, -1.0):
        (slope,) = torch.autograd.grad(
            FakeQuantize.apply(weight, *grid), weight, torch.full_like(weight, sign)
        )
        # A step goes against the gradient: a positive one lowers the weight.
        expected = torch.full_like(weight, sign)
        expected[0 if sign > 0 else -1] = 0.0
        assert torch.equal(slope, expected)


def test_one_scale_for_all_sums_what_all_give():
    weight = torch.randn(3, 1, 4, dtype=torch.float64)
    shared = torch.tensor([[[0.3]]], dtype=torch.float64, requires_grad=True)
    own = shared.detach().expand(3, 1, 1).clone().requires_grad_(True)
    zero = torch.tensor([[[1.0]]], dtype=torch.float64)
    FakeQuantize.apply(weight, shared, zero, 2).square().sum().backward()
    FakeQuantize.apply(weight, own, zero, 2).square().sum().backward()
    torch.testing.assert_close(shared.grad.sum(), own.grad.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_gradients_come_in_the_dtype_of_the_weight(dtype):
    weight = torch.randn(2, 1, 3, dtype=dtype, requires_grad=True)
    FakeQuantize.apply(weight, torch.ones(2, 1, 1), torch.zeros(2, 1, 1), 3).sum().backward()
    assert weight.grad.dtype is dtype
