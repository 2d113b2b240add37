"""Figures of single weights: SQNR, bytes, histogram and the typical row's levels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.codes.grid import Coded, Grid, row_levels
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.methods.rtn import quantize_weight
from clipquant.report.layers import (
    histogram,
    rows_by_width,
    sqnr_of,
    stored_bytes,
    typical_values,
)


def mixed() -> QuantizedTensor:
    """Three rows of 0, 2 and 2 bits; the step of row 2 is the larger."""
    bits = torch.tensor([0, 2, 2], dtype=torch.uint8)
    scale = torch.tensor([[0.7], [0.1], [0.2]])
    grid = Grid(scale, torch.tensor([[-1.0], [1.0], [1.0]]), row_levels(bits), 3)
    codes = torch.tensor([[0, 0, 0], [0, 1, 3], [1, 2, 3]], dtype=torch.uint8)
    return QuantizedTensor(
        coded=Coded(codes, grid),
        bits=bits,
        layout=quantize_weight(torch.zeros(3, 3), QuantSpec(2)).layout,
        dtype=torch.float32,
    )


def test_rows_of_different_widths_are_counted_and_weighed() -> None:
    assert rows_by_width(mixed()) == {0: 1, 2: 2}
    assert stored_bytes(mixed()) == 2 * 1 + 3 + 12 + 12
    assert torch.allclose(dequantize(mixed())[0], torch.full((3,), 0.7))


def test_typical_values_are_of_a_row_of_the_commonest_width_above_zero() -> None:
    levels, row = typical_values(mixed())
    assert row == 1
    assert levels == pytest.approx((-0.1, 0.0, 0.1, 0.2))


@given(st.integers(1, 8), st.sampled_from(["tensor", "channel", 3]))
def test_every_code_of_the_typical_row_stands_on_a_level(bits: int, granularity: str | int) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(5, 11)
    spec = QuantSpec(bits, symmetric=False, granularity=granularity)  # type: ignore[arg-type]
    tensor = quantize_weight(weight, spec)
    levels, row = typical_values(tensor)
    first_group = dequantize(tensor)[row, : tensor.group_size]
    assert len(levels) == 2**bits
    assert all(min(abs(v - level) for level in levels) < 1e-5 for v in first_group.tolist())


def test_histogram_counts_every_weight_relative_to_the_fullest_bin() -> None:
    weight = torch.cat([torch.linspace(0, 1, 480), torch.zeros(10)]).reshape(10, 49)
    bars = histogram(weight, quantize_weight(weight, QuantSpec(2)))
    exact = torch.histc(weight.flatten(), 48, 0, 1)
    assert (bars.low, bars.high) == (0.0, 1.0)
    assert bars.counts == tuple((exact * 63 / exact.max()).ceil().int().tolist())


def test_histogram_of_a_constant_weight_is_one_bar() -> None:
    weight = torch.full((2, 4), 0.5)
    bars = histogram(weight, quantize_weight(weight, QuantSpec(4)))
    assert (bars.counts, bars.low, bars.high) == ((63,), 0.5, 0.5)


def test_sqnr_of_nothing_lost_and_of_nothing_there() -> None:
    ones = quantize_weight(torch.ones(2, 3), QuantSpec(8))
    assert sqnr_of(torch.ones(2, 3), ones) == math.inf
    assert sqnr_of(torch.zeros(2, 3), ones) == -math.inf


def sqnr_db(weight: torch.Tensor, quantized: torch.Tensor) -> float:
    """The definition, in float64."""
    noise = (weight.double() - quantized.double()).square().sum()
    return float(10 * torch.log10(weight.double().square().sum() / noise))


@given(
    st.sampled_from([torch.float32, torch.float16, torch.float64]),
    st.integers(1, 30),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e25]),
)
def test_sqnr_in_parts_is_that_of_the_whole(dtype: torch.dtype, cached: int, size: float) -> None:
    weight = (torch.randn(6, 2, 5) * (1 if dtype == torch.float16 else size)).to(dtype)
    layout = Layout((6, 2, 5), axis=1, groups=3)
    tensor = quantize_weight(weight, QuantSpec(3, granularity=4), layout)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipquant.quant.codes.grid._CACHED", cached)
        assert sqnr_of(weight, tensor) == pytest.approx(sqnr_db(weight, dequantize(tensor)), 1e-4)


def test_the_histogram_of_a_large_weight_is_that_of_all_its_values_within_a_bar() -> None:
    weight = torch.randn(1024, 1024)
    bars = histogram(weight, quantize_weight(weight, QuantSpec(2)))
    exact = torch.histc(weight.flatten(), 48, bars.low, bars.high)
    assert (bars.low, bars.high) == (weight.min(), weight.max())
    assert (torch.tensor(bars.counts) - exact * 63 / exact.max()).abs().max() <= 3
