"""Units of tiny gradients joined, and of large ones by rows, are scaled as each row by itself."""

from __future__ import annotations

import math
from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from clipquant.clip.unit_pieces import are_rows, scale_plain_
from clipquant.clip.units import UnitLimits
from clipquant.clip.unitwise import _scale_carefully_

LIMITS = UnitLimits(0.05, 1e-3)
SHAPES = [(4, 3), (6,), (2, 3), (6,), (), (5, 3), (0, 3), (90, 80), (), (3, 1, 3), (1200, 5)]


def reference(grad: Tensor, weight: Tensor) -> Tensor:
    grad, weight = grad.double(), weight.double()
    rows = grad.view(len(grad) if grad.ndim > 1 else 1, -1) if grad.numel() else grad
    if not grad.numel():
        return grad
    limits = 0.05 * weight.view(len(rows), -1).norm(dim=1).clamp(min=1e-3)
    return (rows * (limits / rows.norm(dim=1).clamp(min=1e-6)).clamp(max=1)[:, None]).view_as(grad)


@pytest.mark.parametrize("piece", [1 << 20, 500])
@pytest.mark.parametrize("chunk", [1 << 18, 10])
@pytest.mark.parametrize("scale", [1e-6, 0.05, 10.0])
def test_it_is_each_row_by_itself(piece: int, chunk: int, scale: float) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(shape) for shape in SHAPES]
    grads = [scale * torch.randn(shape) for shape in SHAPES]
    before = [grad.clone() for grad in grads]
    expected = [reference(g, w) for g, w in zip(grads, weights, strict=True)]
    name = "clipquant.clip.unit_pieces"
    with patch(f"{name}._PIECE", piece), patch(f"{name}._CHUNK", chunk):
        outcome = scale_plain_(grads, weights, LIMITS, True, partial(_scale_carefully_, LIMITS))
    for grad, want, old in zip(grads, expected, before, strict=True):
        torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-9)
        if torch.equal(want, old.double()):
            assert torch.equal(grad, old)
    assert outcome.clipped == (scale > 1e-6)
    assert outcome.before is not None
    assert outcome.after is not None
    norms = [float(g.double().norm()) for g in before]
    assert outcome.before.each.tolist() == pytest.approx(norms, rel=1e-5)
    after = [float(g.norm()) for g in expected]
    assert outcome.after.each.tolist() == pytest.approx(after, rel=1e-5)
    assert outcome.after.total == pytest.approx(math.hypot(*after), rel=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1, 4, 7])
def test_what_is_not_finite_is_found_among_tiny_and_large(bad: float, where: int) -> None:
    grads = [torch.ones(shape) for shape in SHAPES]
    weights = [torch.ones(shape) for shape in SHAPES]
    grads[where][(-1,) * grads[where].ndim] = bad
    outcome = scale_plain_(grads, weights, LIMITS, False, partial(_scale_carefully_, LIMITS))
    assert not outcome.finite
    assert outcome.before is None


def test_squares_that_overflow_among_tiny_ones() -> None:
    grads = [torch.full((2, 3), 1e30), torch.full((2, 3), 1e-3)]
    weights = [torch.ones(2, 3), torch.ones(2, 3)]
    outcome = scale_plain_(grads, weights, LIMITS, True, partial(_scale_carefully_, LIMITS))
    assert outcome.finite
    torch.testing.assert_close(grads[0], torch.full((2, 3), 0.05), rtol=1e-5, atol=0)
    assert outcome.before is not None
    assert outcome.before.each[0].item() == pytest.approx(1e30 * 6**0.5, rel=1e-6)


def test_rows_are_views_of_plain_tensors_only() -> None:
    assert are_rows([torch.ones(2, 3), torch.ones(())])
    for other in (torch.ones(3, 2).t(), torch.ones(2).half(), torch.ones(2, device="meta")):
        assert not are_rows([other])
