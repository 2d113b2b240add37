import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clipquant.quant.codes.grid import Coded, Grid, dequantize_rows, group, quantize_rows, ungroup
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.ranges import minmax_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.methods.rtn import quantize_weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
finite = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
matrices = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=9), elements=finite
)
specs = st.builds(
    lambda bits, symmetric, granularity: QuantSpec(bits, None, symmetric and bits > 1, granularity),
    st.integers(1, 8),
    st.booleans(),
    st.one_of(st.sampled_from(["tensor", "channel"]), st.integers(1, 10)),
)


@given(w=matrices, grid=st.sampled_from([(b, None) for b in range(1, 9)] + [(8, 8)]))
def test_min_max_quantization_is_the_reference_formula(w, grid):
    """DESIGN 3.3 in float64: the codes to the last one, the weights to float32 rounding."""
    bits, levels = grid
    low, high = float(w.min()), float(w.max())
    quantized = quantize_weight(torch.tensor(w), QuantSpec(bits, levels, False, "tensor"))
    values = dequantize(quantized).double().numpy()
    if low == high:
        assert np.array_equal(values, w.astype(np.float64))
        return
    steps = levels or 2**bits - 1
    codes = np.round((w.astype(np.float64) - low) / (high - low) * steps)
    assert np.array_equal(quantized.codes.numpy(), codes)
    expected = low + codes * (high - low) / steps
    bound = 1e-3 * (high - low) / steps + 2**-23 * np.abs(w).max()
    assert np.abs(values - expected).max() <= bound


@given(w=matrices, spec=specs, dtype=st.sampled_from(DTYPES))
def test_each_weight_moves_by_at_most_half_a_step(w, spec, dtype):
    weight = torch.tensor(w).to(dtype)
    quantized = quantize_weight(weight, spec)
    step = quantized.scale.double().abs()
    moved = group((dequantize(quantized) - weight).double().abs(), quantized.group_size)
    # Half a step; the rounding of the weight's own dtype; that of float32 where it computes.
    slack = weight.abs().max().double() * (torch.finfo(dtype).eps + 2**-22)
    assert (moved <= 0.5 * step.unsqueeze(-1) * (1 + 1e-5) + slack).all()


@given(w=matrices, spec=specs)
def test_codes_stay_on_the_grid(w, spec):
    quantized = quantize_weight(torch.tensor(w), spec)
    assert int(quantized.codes.max()) <= spec.steps
    assert spec.steps < 2**quantized.bits


@given(w=matrices, bits=st.integers(2, 8), granularity=st.sampled_from(["tensor", "channel", 3]))
def test_zero_is_exact_on_symmetric_grids(w, bits, granularity):
    w = np.concatenate([w, np.zeros_like(w[:, :1])], axis=1)
    quantized = quantize_weight(torch.tensor(w), QuantSpec(bits, None, True, granularity))
    assert quantized.zero is None
    assert torch.equal(dequantize(quantized)[:, -1], torch.zeros(len(w)))


@given(value=finite, spec=specs, dtype=st.sampled_from(DTYPES))
def test_a_constant_tensor_is_restored_exactly(value, spec, dtype):
    weight = torch.full((3, 5), value, dtype=dtype)
    assert torch.equal(dequantize(quantize_weight(weight, spec)), weight)


def test_a_constant_row_among_others_is_restored_exactly():
    weight = torch.randn(4, 6)
    weight[2] = 0.3  # no float16 holds it
    for symmetric in (False, True):
        restored = dequantize(quantize_weight(weight, QuantSpec(3, None, symmetric)))
        assert torch.equal(restored[2], weight[2])


def test_scales_are_float16_where_they_fit():
    weight = torch.randn(4, 64)
    assert quantize_weight(weight, QuantSpec(4)).scale.dtype == torch.float16
    assert quantize_weight(weight * 1e-9, QuantSpec(4)).scale.dtype == torch.float32
    assert quantize_weight(weight * 1e7, QuantSpec(4)).scale.dtype == torch.float32
    assert quantize_weight(weight, QuantSpec(4, granularity="tensor")).scale.dtype == torch.float32


def test_a_range_far_from_zero_keeps_its_steps():
    weight = 1000 + torch.rand(1, 50).double() * 1e-6
    restored = dequantize(quantize_weight(weight, QuantSpec(8, None, False, "tensor")))
    assert (restored - weight).abs().max() <= 0.51e-6 / 255


@given(w=matrices, size=st.integers(1, 12))
def test_ungroup_is_the_inverse_of_group(w, size):
    matrix = torch.tensor(w)
    assert torch.equal(ungroup(group(matrix, size), matrix.shape[1]), matrix)


@given(w=matrices, size=st.integers(1, 12))
def test_the_padding_of_a_short_group_changes_no_scale(w, size):
    matrix = torch.tensor(w)
    grid = minmax_grid(matrix, QuantSpec(4, granularity=size))
    last = matrix[:, (matrix.shape[1] - 1) // size * size :]
    assume(last.shape[1] < size)
    alone = minmax_grid(last.repeat_interleave(2, 1), QuantSpec(4))
    assert torch.allclose(grid.scale[:, -1:].double(), alone.scale.double(), rtol=2e-3, atol=1e-30)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rounding_agrees_with_torch_per_channel(symmetric):
    """torch's own kernel on the same scales and integer zero points gives the same codes."""
    weight = torch.randn(16, 40)
    quantized = quantize_weight(weight, QuantSpec(8, 254, True) if symmetric else QuantSpec(8))
    scale = quantized.scale.double().reshape(-1)
    zero = torch.full_like(scale, 127)
    theirs = torch.quantize_per_channel(weight, scale, zero, 0, torch.quint8).int_repr()
    differing = theirs != quantized.codes
    ties = (weight / scale[:, None]).frac().abs().sub(0.5).abs() < 1e-4
    assert not (differing & ~ties).any()


def test_quantizing_what_was_dequantized_gives_the_same_codes():
    weight = torch.randn(8, 30)
    for spec in (QuantSpec(8), QuantSpec(4), QuantSpec(3, granularity=7), QuantSpec(2, None, True)):
        quantized = quantize_weight(weight, spec)
        grid = quantized.grid
        again = quantize_rows(dequantize_rows(quantized.codes, grid), grid)
        assert torch.equal(again, quantized.codes)


def test_a_bits_vector_gives_each_row_its_own_levels():
    bits = torch.tensor([0, 1, 4], dtype=torch.uint8)
    levels = (2 ** bits.long() - 1).unsqueeze(1)
    scale = torch.tensor([[0.7], [1.0], [0.1]])
    zero = torch.tensor([[-1.0], [0.5], [8.0]])
    grid = Grid(scale, zero, levels, 4)
    codes = quantize_rows(torch.tensor([[0.7] * 4, [-9.0, 9, -1, 1], [-0.8, 0, 0.3, 9]]), grid)
    assert codes.tolist() == [[0, 0, 0, 0], [0, 1, 0, 1], [0, 8, 11, 15]]
    tensor = QuantizedTensor(Coded(codes, grid), bits, Layout((3, 4)), torch.float32)
    assert dequantize(tensor)[0].tolist() == pytest.approx([0.7] * 4)
    assert tensor.code_bits == 20


@given(w=matrices, spec=specs, rows=st.integers(1, 4))
def test_codes_do_not_depend_on_how_many_rows_are_in_the_cache(w, spec, rows):
    matrix = torch.tensor(w)
    grid = minmax_grid(matrix, spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipquant.quant.codes.grid._CACHED", rows * matrix.shape[1])
        few = quantize_rows(matrix, grid)
    assert torch.equal(few, quantize_rows(matrix, grid))


@given(w=hnp.arrays(np.float32, (3, 5), elements=st.floats(-(2.0**127), 2.0**127, width=32)))
def test_weights_far_outside_a_grid_take_its_end(w):
    grid = Grid(torch.full((3, 1), 1e-3), torch.full((3, 1), 7.5), 15, 5)
    with np.errstate(over="ignore"):
        expected = np.clip(np.rint(w / np.float32(1e-3) + np.float32(7.5)), 0, 15)
    assert np.array_equal(quantize_rows(torch.tensor(w), grid).numpy(), expected)
