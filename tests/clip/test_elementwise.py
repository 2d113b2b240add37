"""Clamps and indicators over many blocks: exact, whatever is measured on the way."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipquant.clip.elementwise import clamp_, indicate_

LIMIT = 1.0


def tensors() -> list[Tensor]:
    """Return small, medium and split tensors, transposed ones, halves and complex ones; none beyond 0.9."""
    torch.manual_seed(0)
    shapes = [(3,), (), (0, 4), (5_000,), (70_000,), (3_000_000,)]
    plain = [torch.rand(shape) * 1.8 - 0.9 for shape in shapes]
    complexes = torch.complex(torch.rand(6) - 0.5, torch.rand(6) - 0.5)
    return [*plain, (torch.rand(300, 200) - 0.5).t(), (torch.rand(9) - 0.5).half(), complexes]


def clamped(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        return torch.complex(tensor.real.clamp(-LIMIT, LIMIT), tensor.imag.clamp(-LIMIT, LIMIT))
    return tensor.clamp(-LIMIT, LIMIT)


@pytest.mark.parametrize("order", [None, 1.0, 2.0, math.inf])
@pytest.mark.parametrize("leave", [False, True])
def test_nothing_beyond_the_limit_is_no_clipping(order: float | None, leave: bool) -> None:
    given = tensors()
    before = [t.clone() for t in given]
    outcome = clamp_(given, LIMIT, leave, tell=True, order=order)
    assert (outcome.clipped, outcome.finite) == (False, True)
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("order", [None, 2.0])
@pytest.mark.parametrize("leave", [False, True])
@pytest.mark.parametrize("where", range(9))
@pytest.mark.parametrize("sign", [1, -1])
def test_one_element_beyond_the_limit_by_one_bit_is_found_wherever_it_is(
    order: float | None, leave: bool, where: int, sign: int
) -> None:
    given = tensors()
    if given[where].numel() == 0:
        return
    flat = torch.view_as_real(given[where]) if given[where].is_complex() else given[where]
    beyond = torch.nextafter(torch.tensor(LIMIT), torch.tensor(9.0))
    index = tuple(n - 1 for n in flat.shape)
    flat[index] = sign * (beyond if flat.dtype is torch.float32 else 1.5)
    expected = [clamped(t) for t in given]
    outcome = clamp_(given, LIMIT, leave, tell=True, order=order)
    assert outcome.clipped
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))


def test_norms_before_and_after_are_those_of_whole_tensors() -> None:
    given = [3.0 * t for t in tensors()]
    before = [float(torch.linalg.vector_norm(t.to(torch.complex128))) for t in given]
    after = [float(torch.linalg.vector_norm(clamped(t).to(torch.complex128))) for t in given]
    outcome = clamp_(given, LIMIT, leave=True, tell=True, order=2.0)
    assert outcome.before.each.tolist() == pytest.approx(before, rel=1e-5)
    assert outcome.after.each.tolist() == pytest.approx(after, rel=1e-5)


@pytest.mark.parametrize("order", [None, 2.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", [0, 3, 5, 6, 7])
def test_what_is_not_finite_is_reported(order: float | None, bad: float, where: int) -> None:
    given = tensors()
    given[where][(-1,) * given[where].ndim] = bad
    assert not clamp_(given, LIMIT, leave=True, tell=True, order=order).finite


@pytest.mark.parametrize("order", [None, 2.0])
def test_without_leaving_them_non_finite_gradients_are_clamped_like_torch_does(
    order: float | None,
) -> None:
    given = [torch.tensor([5.0, math.nan, -math.inf, 0.5]), torch.tensor([7.0])]
    clamp_(given, LIMIT, leave=False, tell=True, order=order)
    torch.testing.assert_close(
        given[0], torch.tensor([1.0, math.nan, -1.0, 0.5]), equal_nan=True, rtol=0, atol=0
    )
    assert given[1].tolist() == [1.0]


def test_indicators_count_their_ones_in_the_norm() -> None:
    given = tensors()[:7]
    expected = [(t.abs() > 0.3).to(t.dtype) for t in given]
    outcome = indicate_(given, 0.3, leave=True, order=2.0)
    assert outcome.clipped
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    assert outcome.after.each.square().tolist() == pytest.approx([float(e.sum()) for e in expected])
    assert not indicate_(given, 0.3, leave=True, order=2.0).clipped
