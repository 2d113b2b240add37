"""Unit-wise scaling of many gradients at once equals each gradient by itself, in exact arithmetic."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipquant.clip.units import UnitLimits, unit_norms
from clipquant.clip.unitwise import scale_units_

LIMITS = UnitLimits(0.05, 1e-3)
SHAPES = [(4, 3), (7,), (), (2, 3, 3, 3), (0, 5), (5, 0), (1, 1)]


def reference(grad: Tensor, weight: Tensor, limits: UnitLimits) -> Tensor:
    """Scale row by row in float64."""
    grad, weight = grad.double(), weight.double()
    if grad.numel() == 0:
        return grad
    rows = [(grad, weight)] if grad.ndim < 2 else list(zip(grad, weight, strict=True))
    scaled = []
    for g, w in rows:
        limit = limits.ratio * max(float(w.norm()), limits.eps)
        scaled.append(g * min(1.0, limit / max(float(g.norm()), 1e-6)))
    return scaled[0] if grad.ndim < 2 else torch.stack(scaled)


def example(seed: int, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator) for shape in SHAPES]
    grads = [scale * torch.randn(shape, generator=generator) for shape in SHAPES]
    weights += [weights[0].double(), torch.zeros(3, 4), weights[3].transpose(0, 1).clone()]
    grads += [grads[0].double(), torch.full((3, 4), scale), grads[3].transpose(0, 1).clone()]
    return grads, weights


@pytest.mark.parametrize("scale", [1e-4, 0.05, 10.0])
def test_all_at_once_equals_each_row_by_itself(scale: float) -> None:
    grads, weights = example(0, scale)
    expected = [reference(g, w, LIMITS) for g, w in zip(grads, weights, strict=True)]
    before = [float(g.double().norm()) for g in grads]
    outcome = scale_units_(grads, weights, LIMITS)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)
    assert outcome.before.each.tolist() == pytest.approx(before, rel=1e-5)
    assert outcome.after.each.tolist() == pytest.approx(
        [float(e.norm()) for e in expected], rel=1e-5
    )


def test_units_within_are_untouched_bit_for_bit() -> None:
    grads, weights = example(1, 1e-9)
    before = [g.clone() for g in grads]
    assert not scale_units_(grads, weights, LIMITS).clipped
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True))


def test_more_gradients_than_one_block_holds() -> None:
    torch.manual_seed(0)
    weights = [torch.randn(300, 4000), torch.randn(9), torch.randn(200, 3000)]
    grads = [torch.randn_like(weight) for weight in weights]
    expected = [reference(g, w, LIMITS) for g, w in zip(grads, weights, strict=True)]
    outcome = scale_units_(grads, weights, LIMITS)
    for grad, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)
    assert outcome.after.each.tolist() == pytest.approx(
        [float(e.norm()) for e in expected], rel=1e-5
    )


@pytest.mark.parametrize("scale", [1e-4, 3e-2, 1.0], ids=["all within", "near", "all beyond"])
@pytest.mark.parametrize("block", [1 << 20, 5000], ids=["whole", "by rows"])
def test_long_rows_equal_each_row_by_itself(scale: float, block: int) -> None:
    # The first eighth of a long row may decide: of the second weight it is zero, of the third it is all there is.
    torch.manual_seed(0)
    weights = [torch.randn(70, 1100), torch.randn(66, 1024), torch.zeros(66, 2, 1024)]
    weights[1][:, :128] = 0
    weights[2][:, 0, :256] = torch.randn(66, 256)
    grads = [scale * torch.randn_like(weight) for weight in weights]
    expected = [reference(g, w, LIMITS) for g, w in zip(grads, weights, strict=True)]
    originals = [g.clone() for g in grads]
    with patch("clipquant.clip.unit_pieces._PIECE", block):
        outcome = scale_units_(grads, weights, LIMITS)
    for grad, want, original in zip(grads, expected, originals, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)
        same = (want == original.double()).flatten(1).all(1)
        assert torch.equal(grad[same], original[same])
    assert outcome.clipped == (scale > 1e-4)
    assert outcome.after.each.tolist() == pytest.approx(
        [float(e.norm()) for e in expected], rel=1e-5
    )


def test_a_row_beyond_its_limit_is_found_after_a_first_eighth_that_is_large() -> None:
    weights, grads = torch.zeros(70, 1024), torch.zeros(70, 1024)
    weights[:, 0] = 1.0
    grads[:, -1] = 0.04
    grads[69, -1] = 0.06
    assert scale_units_([grads], [weights], LIMITS).clipped
    assert grads[:, -1].tolist() == pytest.approx([0.04] * 69 + [0.05])


def test_without_measuring_there_are_no_norms() -> None:
    grads, weights = example(3, 1.0)
    outcome = scale_units_(grads, weights, LIMITS, measure=False)
    assert outcome.clipped
    assert outcome.finite
    assert outcome.before is None
    assert outcome.after is None


@given(st.integers(0, 99), st.floats(1e-3, 10), st.floats(1e-3, 1.0))
def test_after_scaling_no_unit_is_beyond_its_limit(seed: int, scale: float, ratio: float) -> None:
    grads, weights = example(seed, scale)
    plan = UnitLimits(ratio, 1e-3)
    scale_units_(grads[:7], weights[:7], plan)
    for grad, weight in zip(grads[:7], weights[:7], strict=True):
        limit = unit_norms(weight).clamp(min=1e-3) * ratio
        assert bool((unit_norms(grad) <= limit * (1 + 1e-5) + 1e-12).all())


@pytest.mark.parametrize("shape", [(2, 4), (8,)])
def test_units_whose_squares_overflow_are_scaled_not_zeroed(shape: tuple[int, ...]) -> None:
    grad, weight = torch.full(shape, 1e30), torch.ones(shape)
    outcome = scale_units_([grad], [weight], LIMITS)
    assert outcome.finite
    torch.testing.assert_close(grad, torch.full(shape, 0.05), rtol=1e-5, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("weight", [1.0, 1e30], ids=["", "beside weights whose squares overflow"])
def test_what_is_not_finite_is_reported_in_a_long_row(bad: float, weight: float) -> None:
    grads, weights = [torch.zeros(70, 1024)], [torch.full((70, 1024), weight)]
    grads[0][69, 1023] = bad
    assert not scale_units_(grads, weights, LIMITS).finite


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_reported(bad: float) -> None:
    grads, weights = example(2, 1.0)
    grads[3][1, 2, 0, 1] = bad
    assert not scale_units_(grads, weights, LIMITS).finite


def test_a_coefficient_never_amplifies() -> None:
    grad_norms = torch.tensor([0.0, 1e-9, 0.04, 0.05, 0.06, 5.0])
    found = LIMITS.coefficients(grad_norms, torch.ones(6))
    assert found.tolist() == pytest.approx([1.0, 1.0, 1.0, 1.0, 0.05 / 0.06, 0.01])
