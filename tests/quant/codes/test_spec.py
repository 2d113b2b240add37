import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec, check_bits


@pytest.mark.parametrize("bits", [0, 9, 3.5, "eight", True, None])
def test_bits_outside_1_to_8_are_refused_quoting_them(bits):
    with pytest.raises(ValueError, match=rf"whole number from 1 to 8; got {bits!r}"):
        check_bits(bits)


@pytest.mark.parametrize("levels", [0, -1, 16, 2.0, True])
def test_levels_must_fit_the_bits(levels):
    with pytest.raises(ValueError, match=rf"from 1 to 2\*\*bits - 1 = 15; got {levels!r}"):
        QuantSpec(4, levels)


@pytest.mark.parametrize("granularity", [0, -3, "row", 2.5, True])
def test_granularity_is_a_word_or_a_group_size(granularity):
    with pytest.raises(ValueError, match=f"got {granularity!r}"):
        QuantSpec(4, granularity=granularity)


def test_one_bit_has_no_symmetric_grid():
    with pytest.raises(ValueError, match="symmetric=False"):
        QuantSpec(1, symmetric=True)


def test_plain_8_bits_are_symmetric_and_all_else_is_affine():
    assert QuantSpec(8).symmetric
    assert not QuantSpec(7).symmetric
    assert not QuantSpec(8, levels=8).symmetric


@pytest.mark.parametrize(("levels", "width"), [(1, 1), (3, 2), (4, 3), (8, 4), (255, 8)])
def test_a_code_takes_the_bits_that_its_levels_need(levels, width):
    assert QuantSpec(8, levels).width == width


@given(
    groups=st.integers(1, 3),
    inputs=st.integers(1, 4),
    outputs=st.integers(1, 4),
    dims=st.integers(1, 3),
)
def test_rows_of_a_transposed_convolution_are_its_output_channels(groups, inputs, outputs, dims):
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]
    layer = kind(groups * inputs, groups * outputs, 2, groups=groups, bias=False)
    layout = Layout(tuple(layer.weight.shape), 1, groups)
    weight = layer.weight.detach()
    matrix = layout.fold(weight)
    assert torch.equal(layout.unfold(matrix), weight)

    x = torch.randn(1, groups * inputs, *[3] * dims)
    before = layer(x)
    matrix = matrix.clone()
    matrix[0] = 0  # one row off: one output channel off, and no other
    layer.weight.data = layout.unfold(matrix)
    after = layer(x)
    assert torch.equal(after[:, 0], torch.zeros_like(after[:, 0]))
    assert torch.equal(after[:, 1:], before[:, 1:])
