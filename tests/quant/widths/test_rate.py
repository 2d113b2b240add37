"""A weight at steps from coarse to fine: what its table says is what its codes are."""

import pytest
import torch

from clipquant.quant.codes.entropy import encode
from clipquant.quant.codes.zeros import is_pruned
from clipquant.quant.network.moments import Moments
from clipquant.quant.widths.frontier import Choices, frontier
from clipquant.quant.widths.rate import CHOICES, rated_apart, rated_rows
from clipquant.quant.widths.rows import believed_hessian, damped_error, row_hessian, solve_rows

ROWS, COLUMNS = 24, 90


def weight(zeros=0.0):
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn(ROWS, COLUMNS, generator=random) * torch.rand(ROWS, 1, generator=random)
    return matrix * (torch.rand(ROWS, COLUMNS, generator=random) >= zeros)


@pytest.fixture(scope="module")
def moments():
    x = torch.randn(400, COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.5
    unread = torch.zeros(1, ROWS)
    hessian = (x.T @ x / 400)[None]
    return Moments(hessian, torch.zeros(1, ROWS, COLUMNS), unread, x.mean(0)[None], unread, 400)


def tables(matrix, moments, size=COLUMNS):
    fisher = torch.rand(ROWS, COLUMNS, generator=torch.Generator().manual_seed(2)) + 0.1
    return {
        "rows": rated_rows(matrix, moments, size, centred=False),
        "centred": rated_rows(matrix, moments, size, centred=True),
        "apart": rated_apart(matrix, fisher, size),
    }, fisher


@pytest.mark.parametrize("size", [COLUMNS, 32])
@pytest.mark.parametrize("zeros", [0.0, 0.8])
def test_errors_and_losses_are_those_of_the_codes_taken(moments, size, zeros):
    matrix = weight(zeros)
    found, fisher = tables(matrix, moments, size)
    for name, table in found.items():
        for step in range(CHOICES):
            coded = table.take(torch.full((ROWS,), step, dtype=torch.uint8))
            off = coded.values().double() - matrix.double()
            if name == "apart":
                error = (off.square() * fisher).sum(1)
            else:
                h = believed_hessian(row_hessian(moments, 0, name == "centred"), moments)
                h = damped_error(h).hessian.double()
                error = ((off @ h) * off).sum(1)
            assert torch.allclose(table.errors[:, step], error, rtol=1e-3, atol=1e-6)
            if name == "centred":
                lost = table.shift(torch.full((ROWS,), step, dtype=torch.uint8))
                assert torch.allclose(lost, -(off.float() @ moments.mean[0]), atol=1e-4)


def test_rows_take_the_fewest_bits_that_hold_their_codes(moments):
    table = tables(weight(), moments)[0]["rows"]
    steps = torch.arange(ROWS, dtype=torch.uint8) % CHOICES
    coded, widths = table.take(steps), table.widths(steps)
    assert (widths[steps == 0] == 0).all()
    codes = coded.codes.long() - torch.where(widths > 0, 2 ** (widths.long() - 1), 0)[:, None]
    for row in range(ROWS):
        low, high = int(codes[row].min()), int(codes[row].max())
        least = (
            0
            if low == high == 0
            else next(w for w in range(1, 9) if -(1 << w - 1) <= low and high < 1 << w - 1)
        )
        assert int(widths[row]) == least
    assert torch.equal(coded.grid.levels[:, 0], 2 ** widths.long() - 1)


def test_finer_steps_cost_more_and_lose_less(moments):
    for table in tables(weight(), moments)[0].values():
        assert (table.errors.mean(0)[1:].diff() < 1e-4).all()
        assert (table.errors.mean(0)[6:].diff() < 0).all()
        assert table.errors[:, 6].mean() < table.errors[:, 0].mean()
        assert (table.bits.mean(0).diff() > -1e-4).all()
        assert (table.bits.mean(0)[6:].diff() > 0).all()


def test_the_bits_said_are_those_of_the_file(moments):
    pytest.importorskip("constriction")
    matrix = torch.randn(64, 400, generator=torch.Generator().manual_seed(5))
    table = rated_apart(matrix, torch.ones_like(matrix), 400)
    for step in (5, 7, 9):
        steps = torch.full((64,), step, dtype=torch.uint8)
        coded, widths = table.take(steps), table.widths(steps)
        said, real = (
            float(table.prices()[:, step].sum()),
            len(encode(coded.codes, coded.grid, widths)),
        )
        assert said == pytest.approx(real, rel=0.05, abs=64)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_as_many_bytes_lose_less_than_dense_codes(moments, share):
    """The sum over rows that each spend what lowers it the most, in either coding."""
    matrix = weight()
    dense = solve_rows(matrix, moments, range(9), COLUMNS, centred=False)
    coded = rated_rows(matrix, moments, COLUMNS, centred=False)
    size = int(share * matrix.numel())
    lost = []
    for table, choices in (
        (dense, Choices(COLUMNS, dense.errors)),
        (coded, Choices(COLUMNS, coded.errors, tuple(range(CHOICES)), coded.prices())),
    ):
        taken = frontier({"w": choices}).fill(size)["w"]
        lost.append(float(table.errors.gather(1, taken.long()[:, None]).sum()))
    assert lost[1] < 0.95 * lost[0]


@pytest.mark.parametrize("name", ["rows", "centred", "apart"])
def test_zeros_of_a_pruned_weight_stay_zero(moments, name):
    matrix = weight(0.8)
    assert is_pruned(matrix)
    table = tables(matrix, moments)[0][name]
    for step in range(CHOICES):
        values = table.take(torch.full((ROWS,), step, dtype=torch.uint8)).values()
        assert not values[matrix == 0].any()
    assert table.take(torch.zeros(ROWS, dtype=torch.uint8)).values().eq(0).all()


def test_a_constant_row_is_exact_without_a_code(moments):
    matrix = weight()
    matrix[3] = 0.3
    table = rated_rows(matrix, moments, COLUMNS, centred=False)
    values = table.take(torch.zeros(ROWS, dtype=torch.uint8)).values()
    assert torch.equal(values[3], matrix[3])
    assert float(table.errors[3, 0]) == 0.0
