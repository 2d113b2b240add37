"""Norms against sums in exact arithmetic, and what every tensor's norm has to keep."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipquant.clip.norms import (
    bounded_norms,
    combine_norms,
    norms_by_group,
    norms_of_owners,
    tensor_norms,
)

ORDERS = st.sampled_from([1.0, 2.0, 3.5, math.inf])
VALUES = st.lists(st.floats(-1e3, 1e3, width=32), max_size=20)


def exact_norm(values: list[float], order: float) -> float:
    if order == math.inf:
        return max(map(abs, values), default=0.0)
    return math.fsum(abs(v) ** order for v in values) ** (1 / order)


def double_norm(tensor: Tensor, order: float = 2.0) -> float:
    return float(torch.linalg.vector_norm(tensor.double(), order))


@given(st.lists(VALUES, min_size=1, max_size=5), ORDERS)
def test_each_norm_is_that_of_exact_sums(lists: list[list[float]], order: float) -> None:
    norms = tensor_norms([torch.tensor(values) for values in lists], order)
    expected = [exact_norm(values, order) for values in lists]
    assert norms.tolist() == pytest.approx(expected, rel=1e-5, abs=1e-18)


@given(st.lists(VALUES, min_size=1, max_size=5), ORDERS)
def test_combined_norms_are_the_norm_of_the_concatenation(
    lists: list[list[float]], order: float
) -> None:
    tensors = [torch.tensor(values, dtype=torch.float64) for values in lists]
    together = combine_norms(tensor_norms(tensors, order), order)
    expected = exact_norm([v for values in lists for v in values], order)
    assert float(together) == pytest.approx(expected, rel=1e-9, abs=1e-18)


# Lengths around the row of 1024 and the size from which rows are taken.
@pytest.mark.parametrize("size", [131_071, 131_072, 131_073, 200_000, 1_048_576, 1_500_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_tensors_row_by_row(size: int, dtype: torch.dtype) -> None:
    values = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size))
    (norm,) = tensor_norms([values])
    assert norm.dtype is dtype
    assert float(norm) == pytest.approx(
        double_norm(values), rel=1e-7 if dtype is torch.float32 else 1e-14
    )


@pytest.mark.parametrize("layout", ["transposed", "channels_last", "strided", "expanded"])
def test_elements_that_do_not_lie_side_by_side(layout: str) -> None:
    torch.manual_seed(0)
    values = {
        "transposed": torch.randn(400, 500).t(),
        "channels_last": torch.randn(8, 32, 30, 30).to(memory_format=torch.channels_last),
        "strided": torch.randn(400_000)[::2],
        "expanded": torch.randn(1, 500).expand(400, 500),
    }[layout]
    # torch adds up strided elements one by one: its own rounding.
    assert float(tensor_norms([values])[0]) == pytest.approx(double_norm(values), rel=1e-4)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 5_000, 300_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_norm_is_finite_exactly_where_every_element_is(
    order: float, bad: float, size: int, dtype: torch.dtype
) -> None:
    good = torch.full((size,), 0.5, dtype=dtype)
    damaged = good.clone()
    damaged[size // 2] = bad
    finite, broken = tensor_norms([good, damaged], order).tolist()
    assert math.isfinite(finite)
    assert not math.isfinite(broken)


@pytest.mark.parametrize("size", [4, 200_000])
@pytest.mark.parametrize("order", [2.0, 3.0])
def test_powers_that_overflow_float32_give_a_finite_norm(size: int, order: float) -> None:
    values = torch.full((size,), 1e30)
    assert float(tensor_norms([values, torch.ones(2)], order)[0]) == pytest.approx(
        1e30 * size ** (1 / order), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    assert tensor_norms([torch.zeros(0, dtype=dtype)]).tolist() == [0.0]
    values = torch.randn(300_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert float(tensor_norms([values])[0]) == pytest.approx(double_norm(values), rel=1e-6)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_a_complex_tensors_norm_is_that_of_its_magnitudes(order: float) -> None:
    values = torch.randn(40, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    expected = float(torch.linalg.vector_norm(values.abs().double(), order))
    assert float(tensor_norms([values], order)[0]) == pytest.approx(expected, rel=1e-6)


@given(st.lists(st.floats(0, 1e30), max_size=12), st.data(), ORDERS)
def test_norms_of_groups_and_of_owners(
    norms: list[float], data: st.DataObject, order: float
) -> None:
    owners = data.draw(
        st.lists(st.integers(0, 3), min_size=len(norms), max_size=len(norms)), label="owners"
    )
    doubles = torch.tensor(norms, dtype=torch.float64)
    expected = {
        owner: exact_norm(
            [n / 1e10 for n, o in zip(norms, owners, strict=True) if o == owner], order
        )
        for owner in range(4)
    }
    by_owner = norms_of_owners(doubles, torch.tensor(owners, dtype=torch.int64), 4, order) / 1e10
    assert by_owner.tolist() == pytest.approx(list(expected.values()), rel=1e-6, abs=1e-12)
    by_group = norms_by_group(doubles, owners, order) / 1e10
    assert by_group.tolist() == pytest.approx(
        [expected[owner] for owner in sorted(set(owners))], rel=1e-6, abs=1e-12
    )


@pytest.mark.parametrize("order", [1.0, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("size", [5, 131_072, 140_001])
def test_no_element_is_larger_than_the_largest_part(order: float, size: int) -> None:
    values = torch.randn(size, generator=torch.Generator().manual_seed(size))
    values[size - 1] = 50.0
    norms, (parts,) = bounded_norms([values], order)
    assert float(parts.max()) >= 50.0
    assert float(norms[0]) >= float(parts.max()) * (1 - 1e-6)


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, 3.0])
@pytest.mark.parametrize("layout", ["flat", "channels_last", "gaps"])
def test_every_order_is_accurate_over_millions_of_elements(order: float, layout: str) -> None:
    torch.manual_seed(0)
    values = torch.rand(8_000_000)
    if layout == "channels_last":
        values = values.view(20, 100, 50, 80).to(memory_format=torch.channels_last)
    if layout == "gaps":
        values = values.view(-1, 2)[:, 0]
    exact = double_norm(values, order)
    assert float(tensor_norms([values], order)[0]) == pytest.approx(exact, rel=1e-5)
