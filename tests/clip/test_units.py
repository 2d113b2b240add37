"""Norms of units against sums in exact arithmetic, for every shape, axis and dtype, and the limits that follow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from clipquant.clip.units import UnitLimits, front, row_norms, unit_norms

SHAPES = [(), (7,), (4, 3), (1, 5), (2, 3, 3, 3), (3, 2, 1)]


def exact(tensor: Tensor, axis: int) -> list[float]:
    """Return the norms in the order of the units, summed element by element without rounding."""
    units = [tensor] if tensor.ndim < 2 else list(tensor.unbind(axis))
    return [math.sqrt(math.fsum(abs(x) ** 2 for x in unit.flatten().tolist())) for unit in units]


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_unit_has_its_exact_norm(
    shape: tuple[int, ...], dtype: torch.dtype, axis: int
) -> None:
    torch.manual_seed(0)
    tensor = torch.randn(shape, dtype=dtype)
    norms = unit_norms(tensor, axis)
    assert norms.flatten().tolist() == pytest.approx(exact(tensor, axis), rel=1e-6)
    assert norms.dtype is (torch.float64 if dtype is torch.float64 else torch.float32)
    # The shape is the one that multiplies the tensor seen from its units' axis.
    assert (norms * front(tensor, axis)).shape == front(tensor, axis).shape


def test_a_transposed_view_has_the_norms_of_its_copy() -> None:
    tensor = torch.randn(6, 5, 2).permute(2, 0, 1)
    assert torch.allclose(unit_norms(tensor), unit_norms(tensor.contiguous()), rtol=1e-6)
    assert torch.allclose(row_norms(tensor), tensor.flatten(1).norm(dim=1), rtol=1e-6)


@pytest.mark.parametrize("magnitude", [1e25, 3e38])
def test_squares_that_overflow_do_not_make_a_norm_infinite(magnitude: float) -> None:
    tensor = torch.ones(3, 2)
    tensor[1] = magnitude
    one = float(tensor[1, 0])
    assert unit_norms(tensor)[1].item() == pytest.approx(math.sqrt(2) * one, rel=1e-6)


def test_empty_tensors_have_empty_or_zero_norms() -> None:
    assert unit_norms(torch.zeros(0, 5)).numel() == 0
    assert unit_norms(torch.zeros(3, 0)).flatten().tolist() == [0.0, 0.0, 0.0]
    assert unit_norms(torch.zeros(0)).item() == 0.0


def test_a_limit_is_never_below_that_of_the_smallest_weight() -> None:
    limits = UnitLimits(0.5, 0.1)
    assert limits.of(torch.tensor([0.0, 0.1, 2.0])).tolist() == pytest.approx([0.05, 0.05, 1.0])
    factors = limits.coefficients(torch.tensor([0.0, 1.0, 1.0]), torch.tensor([0.0, 0.0, 4.0]))
    assert factors.tolist() == pytest.approx([1.0, 0.05, 1.0])
