"""Coded matrices and their grids: rows taken, chosen and stacked give the values of their parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.codes.grid import Coded, Grid, row_levels
from clipquant.quant.codes.ranges import minmax_grid, plain_rounding
from clipquant.quant.codes.spec import QuantSpec

SPECS = st.builds(
    QuantSpec,
    st.integers(2, 8),
    symmetric=st.booleans(),
    granularity=st.sampled_from(["tensor", "channel", 3]),
)


def coded(spec, seed, rows=6):
    return plain_rounding(torch.randn(rows, 7, generator=torch.Generator().manual_seed(seed)), spec)


@given(SPECS, st.integers(0, 99), st.integers(1, 6))
def test_rows_stacked_again_are_the_whole(spec, seed, count):
    whole = coded(spec, seed)
    parts = whole.split(count)
    assert torch.equal(torch.cat([part.values() for part in parts]), whole.values())
    if spec.granularity != "tensor":
        again = Coded.stack(parts)
        assert torch.equal(again.values(), whole.values())
        assert again.grid.levels == whole.grid.levels


@given(SPECS, st.integers(0, 99), st.lists(st.booleans(), min_size=6, max_size=6))
def test_each_row_is_one_of_the_two(spec, seed, first):
    one, other, rows = coded(spec, seed), coded(spec, seed + 100), torch.tensor(first)
    rows = one.takes(rows)
    values = one.where(rows, other).values()
    expected = torch.where(rows[:, None], one.values(), other.values())
    assert torch.equal(values, expected)
    if spec.granularity == "tensor":
        assert rows.all() == all(first)


def test_one_grid_for_all_rows_is_taken_as_a_whole():
    spec = QuantSpec(3, symmetric=False, granularity="tensor")
    one, other = coded(spec, 0), coded(spec, 1)
    mixed = one.where(torch.tensor([True] * 5 + [False]), other)
    assert torch.equal(mixed.values(), other.values())


def test_the_wider_dtype_of_two_grids_is_taken():
    one, other = coded(QuantSpec(4), 0), coded(QuantSpec(4), 1)
    assert one.grid.scale.dtype == torch.float16
    wide = Coded(other.codes, other.grid.to(torch.float32))
    rows = torch.tensor([True, False] * 3)
    assert one.where(rows, wide).grid.scale.dtype == torch.float32
    assert Coded.stack([one, wide]).grid.scale.dtype == torch.float32


def test_rows_of_different_steps_keep_their_own():
    grids = [minmax_grid(torch.randn(2, 5), QuantSpec(bits, symmetric=False)) for bits in (2, 4)]
    stacked = Grid.stack(grids)
    assert stacked.levels.flatten().tolist() == [3, 3, 15, 15]
    assert torch.equal(row_levels(torch.tensor([2, 2, 4, 4]).byte()), stacked.levels)
    matrix = torch.randn(4, 5) * 9
    whole = Coded.nearest(matrix, stacked)
    parts = [Coded.nearest(part, grid) for part, grid in zip(matrix.chunk(2), grids, strict=True)]
    assert torch.equal(whole.values(), torch.cat([part.values() for part in parts]))


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_nearest_is_nearest(bits):
    matrix = torch.randn(3, 50)
    grid = minmax_grid(matrix, QuantSpec(bits, symmetric=False))
    steps = torch.arange(2**bits, dtype=torch.float32)
    allowed = grid.scale.float() * (steps - grid.zero.float())
    off = (matrix[:, :, None] - allowed[:, None]).abs().amin(2)
    found = (Coded.nearest(matrix, grid).values() - matrix).abs()
    assert torch.allclose(found, off, atol=1e-6)
