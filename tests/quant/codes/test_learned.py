"""Codes as something learned: where they start, what they may become, and the weights they stand for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.codes.grid import Coded, dequantize_rows, quantize_rows
from clipquant.quant.codes.learned import Rounding
from clipquant.quant.codes.ranges import minmax_grid, mse_grid
from clipquant.quant.codes.spec import QuantSpec

SPECS = st.builds(
    QuantSpec,
    st.integers(1, 8),
    symmetric=st.none(),
    granularity=st.sampled_from(["tensor", "channel", 3, 4]),
)


def _start(spec, seed, kind=minmax_grid):
    torch.manual_seed(seed)
    matrix = torch.randn(4, 10)
    matrix[1] = 0.5  # a constant row has a grid of its own
    matrix[2] = 0.0
    grid = kind(matrix, spec)
    return matrix, grid, Rounding.of(matrix, Coded.nearest(matrix, grid))


@given(SPECS, st.integers(0, 9))
def test_it_starts_at_the_codes_given(spec, seed):
    matrix, grid, start = _start(spec, seed)
    codes = quantize_rows(matrix, grid)
    assert (start.coded().codes.int() - codes.int()).abs().max() <= 1  # ties
    held = dequantize_rows(codes, grid)
    assert torch.allclose(start.matrix(), held, atol=1e-5) or not torch.equal(
        start.coded().codes, codes
    )


@given(SPECS, st.integers(0, 9))
def test_codes_that_are_not_the_nearest_are_kept_too(spec, seed):
    matrix, grid, _ = _start(spec, seed)
    top = torch.as_tensor(grid.levels).broadcast_to(matrix.shape)
    codes = (torch.rand(matrix.shape) * (top + 1)).floor().minimum(top).to(torch.uint8)
    assert torch.equal(Rounding.of(matrix, Coded(codes, grid)).coded().codes, codes)


@given(SPECS, st.integers(0, 9))
def test_the_weights_are_those_of_the_codes_on_the_learned_grid(spec, seed):
    _, grid, start = _start(spec, seed, mse_grid)
    start.stretch.add_(0.1)
    if start.shift is not None:
        start.shift.add_(0.2)
    start.offset.uniform_(-3, 3)
    start.limit_()
    assert float(start.offset.abs().max()) <= 1
    own = start.coded().grid
    assert own.scale.dtype == grid.scale.dtype
    held = dequantize_rows(start.coded().codes, own)
    assert torch.allclose(start.matrix(), held, rtol=2e-3, atol=2e-2 * float(held.abs().max()))
    assert int(start.coded().codes.max()) <= int(torch.as_tensor(grid.levels).max())


def test_gradients_pass_the_rounding_and_stop_outside_the_grid():
    _, _, start = _start(QuantSpec(3, symmetric=False), 0, mse_grid)
    start.offset[0] = 20.0
    leaves = [leaf.requires_grad_(True) for _, leaf in start.leaves()]
    offset, stretch, shift = torch.autograd.grad(start.matrix().sum(), leaves)
    assert not offset[0].any()
    inside = offset[3] != 0
    assert inside.sum() >= 8
    assert torch.allclose(offset[3][inside], start.grid.scale[3].float())
    assert stretch.abs().sum() > 0
    assert shift[0] != 0
