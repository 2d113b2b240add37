"""Norms made of pieces are those of the whole gradients."""

from __future__ import annotations

import math
import pickle

import pytest
import torch

from clipquant.clip.pieces import Piece, Pieces, square_of


def test_pieces_in_any_order_and_squares_beside_them() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(n) for n in (5, 7, 3, 900)]
    joined = Piece([2, 0], [3, 5], torch.cat([grads[2], grads[0]]))
    parts = Piece([1], [7], grads[1])
    squares = [0.0, 0.0, 0.0, square_of(grads[3])]
    norms = Pieces(4, [joined, parts], squares)
    expected = [float(g.double().norm()) for g in grads]
    assert norms.each.tolist() == pytest.approx(expected, rel=1e-6)
    assert norms.total == pytest.approx(math.hypot(*expected), rel=1e-6)
    assert float(norms.norm) == pytest.approx(math.hypot(*expected), rel=1e-6)
    assert norms.scaled(0.5).total == pytest.approx(0.5 * math.hypot(*expected), rel=1e-6)
    assert pickle.loads(pickle.dumps(norms)).total == norms.total


def test_a_limit_clamps_the_values_of_pieces() -> None:
    norms = Pieces(1, [Piece([0], [3], torch.tensor([3.0, -4.0, 0.5]))], limit=1.0)
    assert norms.each.tolist() == pytest.approx([1.5])
    assert norms.total == pytest.approx(1.5)


def test_a_gradient_in_several_pieces_is_one() -> None:
    norms = Pieces(1, [Piece([0], [1], torch.tensor([3.0])), Piece([0], [1], torch.tensor([4.0]))])
    assert norms.each.tolist() == [5.0]


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_squares_beyond_float32_are_exact(scale: float) -> None:
    values = scale * torch.tensor([3.0, 4.0])
    assert square_of(values) == pytest.approx(25 * scale**2, rel=1e-6)
    norms = Pieces(1, [Piece([0], [2], values)])
    assert norms.total == pytest.approx(5 * scale, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_shows(bad: float) -> None:
    assert not math.isfinite(square_of(torch.tensor([1.0, bad])))
    norms = Pieces(2, [Piece([0, 1], [1, 1], torch.tensor([1.0, bad]))])
    assert [math.isfinite(norm) for norm in norms.each.tolist()] == [True, False]
    assert not math.isfinite(norms.total)
