"""Every row at every width: never worse than rounding, as good as codes for one width, errors true."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from clipquant.quant.codes.grid import Coded, dequantize_rows, quantize_rows
from clipquant.quant.codes.ranges import extremes, grid_between, minmax_grid, recentre
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods.gptq import Gptq
from clipquant.quant.methods.layerwise import Layer
from clipquant.quant.network.moments import Moments
from clipquant.quant.widths.rows import RowGptq, solve_rows
from clipquant.quant.widths.table import RowTable


def moments(x: Tensor, matrix: Tensor) -> Moments:
    """Return the moments of inputs (groups, positions, columns) and of the outputs of rows on them."""
    weight = matrix.reshape(len(x), -1, matrix.shape[1])
    y = x @ weight.mT
    n = x.shape[1]
    return Moments(
        x.mT @ x / n, y.mT @ x / n, y.square().mean(1), x.mean(1), y.mean(1), n
    )  # fmt: skip


def inputs(groups: int, positions: int, columns: int) -> Tensor:
    mixing = torch.randn(columns, columns) / columns**0.5 + 0.3
    return torch.relu(torch.randn(groups, positions, columns) @ mixing)


def output_errors(table: RowTable, width: int, matrix: Tensor, x: Tensor, centred: bool) -> Tensor:
    """Return each row's mean squared output error, from the inputs themselves."""
    rows = len(matrix)
    values = table.take(torch.full((rows,), width, dtype=torch.uint8)).values()
    return _errors(values, matrix, x, centred)


def _errors(values: Tensor, matrix: Tensor, x: Tensor, centred: bool) -> Tensor:
    off = (values - matrix).double().reshape(len(x), -1, matrix.shape[1])
    y = x.double() @ off.mT
    if centred:
        y = y - y.mean(1, keepdim=True)
    return y.square().mean(1).reshape(-1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([1, 2]), st.sampled_from([24, 7]), st.booleans())
def test_no_row_is_worse_than_rounded_to_nearest(
    seed: int, groups: int, group_size: int, centred: bool
) -> None:
    torch.manual_seed(seed)
    matrix, x = torch.randn(8, 24) * torch.rand(8, 1), inputs(groups, 60, 24)
    table = solve_rows(matrix, moments(x, matrix), range(9), group_size, centred=centred)
    for width in range(1, 9):
        spec = QuantSpec(width, symmetric=False, granularity=group_size)
        low, high = extremes(matrix, spec)
        grid = grid_between(low, high, spec, matrix.shape[1])  # rounded as the table's scales are
        grid = recentre(grid, table.coded[width].grid.scale.dtype, low == high)
        plain = _errors(Coded.nearest(matrix, grid).values(), matrix, x, centred)
        found = output_errors(table, width, matrix, x, centred)
        assert (found <= plain * 1.01 + 1e-9).all()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_all_widths_together_are_as_good_as_one_alone(width: int) -> None:
    torch.manual_seed(width)
    matrix, x = torch.randn(32, 48), inputs(1, 400, 48)
    seen = moments(x, matrix)
    table = solve_rows(matrix, seen, range(9), 48, centred=False)
    one, _ = Gptq().code(Layer(matrix, QuantSpec(width, symmetric=False), seen, False))
    alone = _errors(one.values(), matrix, x, False)
    together = output_errors(table, width, matrix, x, False)
    grid = minmax_grid(matrix, QuantSpec(width, symmetric=False))
    plain = _errors(dequantize_rows(quantize_rows(matrix, grid), grid), matrix, x, False)
    assert together.sum() <= 1.15 * alone.sum()
    assert together.sum() <= 0.7 * plain.sum()


@pytest.mark.parametrize("centred", [False, True])
def test_errors_are_those_of_the_outputs_as_far_as_believed_with_the_damping(
    centred: bool,
) -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(6, 20), inputs(2, 300, 20)
    table = solve_rows(matrix, moments(x, matrix), range(9), 20, centred=centred)
    hessian = (x.double().mT @ x.double() / 300) - (
        torch.einsum("gi,gj->gij", x.double().mean(1), x.double().mean(1)) if centred else 0
    )
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    pull = 0.01 * diagonal.mean(1)
    chance = 20 / (20 + 300)  # columns against samples
    energy = diagonal.repeat_interleave(3, 0)
    for width in range(9):
        values = table.take(torch.full((6,), width, dtype=torch.uint8)).values()
        squares = (values - matrix).double().square()
        expected = (1 - chance) * output_errors(table, width, matrix, x, centred)
        expected += chance * (squares * energy).sum(1) + squares.sum(1) * pull.repeat_interleave(3)
        assert torch.allclose(table.errors[:, width], expected, rtol=2e-3, atol=1e-9)
    assert (table.errors[:, :8] >= table.errors[:, 1:] * 0.8).all()


def test_the_shift_is_the_mean_output_lost() -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(6, 20), inputs(1, 300, 20)
    table = solve_rows(matrix, moments(x, matrix), range(9), 20, centred=True)
    bits = torch.tensor([0, 1, 2, 3, 5, 8], dtype=torch.uint8)
    lost = ((matrix - table.take(bits).values()) @ x[0].T).mean(1)
    shift = table.shift(bits)
    assert shift is not None
    assert torch.allclose(shift, lost, atol=1e-4)


@pytest.mark.parametrize("group_size", [16, 6])
@pytest.mark.parametrize("value", [0.0, -0.1, 1e-7, 70000.0])
def test_a_constant_row_is_exact_at_every_width(value: float, group_size: int) -> None:
    torch.manual_seed(0)
    matrix = torch.cat([torch.full((1, 16), value), torch.randn(1, 16)])
    table = solve_rows(
        matrix, moments(inputs(1, 50, 16), matrix), range(9), group_size, centred=True
    )
    for width in range(9):
        found = table.take(torch.tensor([width, 8], dtype=torch.uint8)).values()
        assert torch.equal(found[0], matrix[0])


def test_rows_do_not_depend_on_how_many_are_worked_on_at_once() -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(10, 20), inputs(1, 200, 20)
    whole = solve_rows(matrix, moments(x, matrix), [0, 2, 4], 20, centred=False)
    few = RowGptq(at_once=20 * 2 * 3)
    parts = solve_rows(matrix, moments(x, matrix), [0, 2, 4], 20, centred=False, knobs=few)
    assert torch.allclose(whole.errors, parts.errors, rtol=1e-3)
    assert sorted(parts.coded) == [0, 2, 4]
    assert torch.isinf(parts.errors[:, 1]).all()


def test_inputs_that_are_always_zero_do_no_harm() -> None:
    torch.manual_seed(0)
    matrix, x = torch.randn(4, 12), inputs(1, 100, 12)
    x[:, :, 5:] = 0
    table = solve_rows(matrix, moments(x, matrix), range(9), 12, centred=False)
    assert torch.isfinite(table.errors).all()
    assert (output_errors(table, 8, matrix, x, False) < 1e-3).all()
    dead = solve_rows(matrix, moments(x * 0, matrix), [2], 12, centred=True)
    assert torch.isfinite(dead.errors[:, 2]).all()
