"""Ranges of least weighted error against min-max, at every width; constants exact."""

from __future__ import annotations

import pytest
import torch

from clipquant.quant.codes.grid import dequantize_rows, quantize_rows
from clipquant.quant.codes.ranges import minmax_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.widths.nearest import nearest_rows, range_grid


@pytest.mark.parametrize("width", range(1, 9))
@pytest.mark.parametrize("group_size", [40, 7])
def test_the_range_is_never_worse_than_min_max_for_the_weights_given(
    width: int, group_size: int
) -> None:
    torch.manual_seed(width)
    matrix, weight = torch.randn(6, 40), torch.rand(1, 40) + 0.01
    spec = QuantSpec(width, symmetric=False, granularity=group_size)

    def error(grid):  # type: ignore[no-untyped-def]
        return (weight * (dequantize_rows(quantize_rows(matrix, grid), grid) - matrix) ** 2).sum()

    assert (
        error(range_grid(matrix, weight, width, group_size))
        <= error(minmax_grid(matrix, spec)) * 1.01
    )


def test_losses_are_the_squared_errors_counted_by_the_gradients() -> None:
    torch.manual_seed(0)
    matrix, fisher = torch.randn(5, 30), torch.rand(5, 30)
    table = nearest_rows(matrix, fisher, [0, 2, 8], 30)
    bits = torch.tensor([0, 2, 8, 2, 0], dtype=torch.uint8)
    values = table.take(bits).values()
    expected = (fisher.double() * (values.double() - matrix.double()) ** 2).sum(1)
    assert torch.allclose(table.errors.gather(1, bits.long()[:, None])[:, 0], expected, rtol=1e-5)
    assert torch.isinf(table.errors[:, [1, 3, 4, 5, 6, 7]]).all()
    assert table.shift(bits) is None


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, 1e-6, 12345.678])
@pytest.mark.parametrize("group_size", [12, 5])
def test_a_constant_row_is_exact_at_every_width(value: float, group_size: int) -> None:
    matrix = torch.cat([torch.full((1, 12), value), torch.randn(1, 12)])
    table = nearest_rows(matrix, torch.rand(2, 12), range(9), group_size)
    for width in range(9):
        found = table.take(torch.tensor([width, 8], dtype=torch.uint8)).values()
        assert torch.equal(found[0], matrix[0])
