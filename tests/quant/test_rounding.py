"""Codes as something learned: where they start, what they may become, and the weights they stand for."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.grid import dequantize_rows, quantize_rows
from clipquant.quant.ranges import minmax_grid, mse_grid
from clipquant.quant.rounding import Rounding
from clipquant.quant.spec import QuantSpec

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
    return matrix, grid, Rounding.of(matrix, quantize_rows(matrix, grid), grid)


@given(SPECS, st.integers(0, 9))
def test_it_starts_at_the_float_weights_and_their_nearest_codes(spec, seed):
    matrix, grid, start = _start(spec, seed)
    codes = quantize_rows(matrix, grid)
    assert (start.codes().int() - codes.int()).abs().max() <= 1  # ties
    inside = dequantize_rows(codes, grid)
    step = (start.matrix() - matrix).abs()
    assert (step <= (inside - matrix).abs() + 1e-5).all()


@given(SPECS, st.integers(0, 9), st.floats(0, 1))
def test_decided_codes_are_those_nearest_and_never_change_again(spec, seed, share):
    matrix, grid, start = _start(spec, seed)
    start.decide_(share)
    count = round(share * matrix.numel())
    assert int(start.decided.sum()) >= count
    before = start.codes()[start.decided]
    start.offset.add_(0.7)
    start.limit_()
    assert torch.equal(start.codes()[start.decided], before)


@given(SPECS, st.integers(0, 9))
def test_all_decided_the_weights_are_those_of_the_codes(spec, seed):
    _, grid, start = _start(spec, seed, mse_grid)
    start.stretch.add_(0.1)
    if start.shift is not None:
        start.shift.add_(0.2)
    start.offset.uniform_(-1, 1)
    start.decide_(1.0)
    own = start.learned_grid()
    assert own.scale.dtype == grid.scale.dtype
    held = dequantize_rows(start.codes(), own)
    assert torch.allclose(start.matrix(), held, rtol=2e-3, atol=2e-2 * float(held.abs().max()))
    assert int(start.codes().max()) <= int(torch.as_tensor(grid.levels).max())


def test_gradients_reach_what_is_learned_and_not_what_is_decided():
    _, _, start = _start(QuantSpec(3, symmetric=False), 0)
    start.decide_(0.5)
    leaves = [leaf.requires_grad_(True) for _, leaf in start.leaves()]
    offset, stretch, shift = torch.autograd.grad(start.matrix().square().sum(), leaves)
    assert not offset[start.decided].any()
    assert offset[~start.decided].any()
    assert stretch.abs().sum() > 0
    assert shift.abs().sum() > 0
