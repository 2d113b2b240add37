"""HQQ against the steps of the paper written out for one group, and against what it minimizes."""

import pytest
import torch

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import minmax_grid, mse_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.hqq import Hqq, hqq_grid


def paper(weights, bits, steps=20, p=0.7, beta=10.0, kappa=1.01):
    """Badri and Shaji 2023, equations 6 and 9, a group a row; the zeros with the least mean |error| of all."""
    top = 2**bits - 1
    low, high = weights.amin(1, True), weights.amax(1, True)
    scale = (high - low) / top
    zero = -low / scale
    best, kept = float("inf"), zero
    for _ in range(steps):
        codes = (weights / scale + zero).round().clamp(0, top)
        error = weights - scale * (codes - zero)
        if error.abs().mean() >= best:
            break
        best, kept = float(error.abs().mean()), zero
        size = error.abs()
        shrunk = error.sign() * (size - size.clamp(min=1e-8) ** (p - 1) / beta).clamp(min=0)
        zero = (codes - (weights - shrunk) / scale).mean(1, True)
        beta *= kappa
    return kept


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_zero_is_that_of_the_paper(bits):
    torch.manual_seed(bits)
    matrix = torch.randn(5, 64)
    grid = hqq_grid(matrix, QuantSpec(bits, symmetric=False))
    assert torch.allclose(grid.zero.double(), paper(matrix.double(), bits), atol=1e-2)


def test_knobs_are_used_and_symmetric_grids_have_no_zero_to_move():
    torch.manual_seed(0)
    matrix = torch.distributions.StudentT(3.0).sample((8, 64))
    spec = QuantSpec(3, symmetric=False)
    still = hqq_grid(matrix, spec, Hqq(steps=1))
    assert torch.equal(still.zero, minmax_grid(matrix, spec).zero)
    assert not torch.equal(hqq_grid(matrix, spec).zero, still.zero)
    even = QuantSpec(4, symmetric=True)
    assert torch.equal(hqq_grid(matrix, even).scale, mse_grid(matrix, even).scale)


def test_a_constant_row_is_exact():
    matrix = torch.tensor([[0.3] * 8, [0.0] * 8])
    assert torch.equal(Coded.nearest(matrix, hqq_grid(matrix, QuantSpec(2))).values(), matrix)
