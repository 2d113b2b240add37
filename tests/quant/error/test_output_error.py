"""Few samples of many columns: the same errors, walks and codes as with H written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.ranges import minmax_grid, plain_rounding, shrunk_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.error.descent import refine, rescale
from clipquant.quant.error.output_error import OutputError
from clipquant.quant.error.walk import gptq_codes, plan_walk, walk_all
from clipquant.quant.methods.gptq import output_error_of
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.layers import select
from clipquant.quant.network.moments import observe
from clipquant.quant.network.sums import add_lower_, mirror_
from clipquant.quant.network.twin import Twin

ROWS, COLUMNS, SAMPLES = 6, 300, 40


@pytest.fixture
def problem():
    """Return float weights, and their output error in both forms, in float64."""
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, COLUMNS, dtype=torch.float64) * torch.rand(COLUMNS).double()
    x[:, 7] = 0.0  # an input that is never on
    matrix = torch.randn(ROWS, COLUMNS)
    y = x @ matrix.double().T + 0.1 * torch.randn(SAMPLES, ROWS)
    energy, goal = y.square().sum(0), y.T @ x
    few = OutputError(torch.zeros(COLUMNS, dtype=torch.float64), goal, energy, x)
    return matrix, OutputError(x.T @ x, goal, energy), few


def test_both_forms_are_the_same_error(problem):
    matrix, dense, few = problem
    values = matrix.double() + 0.1
    for change in (
        lambda error: error,
        lambda error: error.shrunk(matrix, 0.3),
        lambda error: error.shrunk(matrix, 0.3).damped(matrix, 0.01),
        lambda error: error.shrunk(matrix, 0.3).damped(matrix, 0.01).towards(values, matrix.double()),
    ):  # fmt: skip
        one, other = change(dense), change(few)
        assert other.inputs is not None
        assert torch.allclose(one.diagonal(), other.diagonal())
        assert torch.allclose(one.product(values), other.product(values))
        part = slice(100, 140)
        assert torch.allclose(one.inner(part), other.inner(part))
        assert torch.allclose(one.at(values), other.at(values))


@pytest.mark.parametrize("granularity", ["channel", 64, "tensor"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_walk_and_the_descent_choose_the_same_codes(problem, granularity, symmetric):
    matrix = problem[0]
    dense, few = (error.damped(matrix, 0.01) for error in problem[1:])
    spec = QuantSpec(3, symmetric=symmetric, granularity=granularity)
    grid = minmax_grid(matrix, spec)
    one, other = plan_walk(dense), plan_walk(few)
    assert other.few is not None
    assert torch.allclose(one.weights, other.weights, atol=1e-6)
    codes = [gptq_codes(walk, grid) for walk in (one, other)]
    assert torch.equal(codes[0].codes, codes[1].codes)
    refined = [refine(error, codes[0], 2) for error in (dense, few)]
    assert torch.equal(refined[0].codes, refined[1].codes)
    assert torch.allclose(refined[0].grid.scale.float(), refined[1].grid.scale.float())
    assert (dense.of(refined[0]) <= dense.of(codes[0]) + 1e-9).all()


@pytest.mark.parametrize("granularity", ["channel", 64])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_slope_after_rescaling_is_that_of_its_values(problem, granularity, symmetric):
    matrix, dense, _ = problem
    dense = dense.damped(matrix, 0.01)
    coded = plain_rounding(matrix, QuantSpec(2, symmetric=symmetric, granularity=granularity))
    scaled, slope = rescale(dense, dense.slope(coded.values().double()), coded)
    assert torch.allclose(slope, dense.slope(scaled.values().double()), atol=1e-4)
    assert (dense.of(scaled) <= dense.of(coded)).all()
    assert (dense.of(scaled) < 0.95 * dense.of(coded)).any()


def test_grids_walked_together_give_what_each_gives_alone(problem):
    matrix, dense, _ = problem
    walk = plan_walk(dense.damped(matrix, 0.01))
    for granularity in ("channel", 50, "tensor"):
        spec = QuantSpec(2, granularity=granularity)
        grids = [shrunk_grid(matrix, spec, share) for share in (1.0, 0.8, 0.5)]
        for coded, grid in zip(walk_all(walk, grids), grids, strict=True):
            assert coded.grid is grid
            assert torch.equal(coded.codes, gptq_codes(walk, grid).codes)


def test_half_a_symmetric_product_mirrored_is_the_whole():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 2100)
    total = torch.zeros(2, 2100, 2100)
    add_lower_(total, x[:, :4])
    add_lower_(total, x[:, 4:])
    mirror_(total)
    assert torch.allclose(total, x.mT @ x, atol=1e-4)


@pytest.mark.parametrize("bias", [True, False])
def test_few_inputs_are_kept_and_judge_as_their_moments_do(bias):
    torch.manual_seed(0)
    layer = nn.Linear(640, 5, bias=bias)
    batches = [torch.randn(16, 640) + 1.0 for _ in range(8)]
    batches[0][:, 3] = 2.0
    for batch in batches:
        batch[:, 3] = 2.0  # a constant input, which the bias takes up
    twins = (Twin(layer), Twin(layer))
    target = select(layer).targets[0]
    found = [
        observe(twins, [target], Calibration(batches), hold_apart=True, few=few)["weight"]
        for few in (False, True)
    ]
    assert found[1].inputs is not None
    assert found[1].inputs.shape == (1, 96, 640)
    assert found[1].noise == pytest.approx(found[0].noise, rel=1e-3)
    matrix = layer.weight.detach()
    coded = Coded.nearest(matrix, minmax_grid(matrix, QuantSpec(3)))
    for whole, few in (found, [m.apart for m in found]):
        errors = [output_error_of(m, 0, bias).of(coded) for m in (whole, few)]
        assert torch.allclose(errors[0], errors[1], rtol=1e-3)


def test_inputs_that_are_no_longer_few_become_their_moments():
    torch.manual_seed(0)
    layer = nn.Linear(600, 3)
    batches = [torch.randn(30, 600) for _ in range(5)]  # 150 of 600: kept as far as 100
    twins = (Twin(layer), Twin(layer))
    moments = observe(twins, select(layer).targets, Calibration(batches), few=True)["weight"]
    assert moments.inputs is None
    x = torch.cat(batches)
    assert torch.allclose(moments.hessian[0], x.T @ x / len(x), atol=1e-4)
