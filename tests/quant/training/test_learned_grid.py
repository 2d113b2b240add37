"""Grids while they are trained: where they start, and that what a forward pass sees is what is stored."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.codes.grid import Coded
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.ranges import mse_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.training.learned_grid import LearnedGrid, first_grid

SPECS = [
    QuantSpec(1),
    QuantSpec(2, 2, True),
    QuantSpec(2),
    QuantSpec(3, granularity="tensor"),
    QuantSpec(4, granularity=4),
    QuantSpec(8),
]
LAYOUTS = [Layout((6, 10)), Layout((4, 3, 5), axis=1), Layout((6, 2, 3, 3), axis=1, groups=2)]


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_what_is_seen_is_what_is_stored_to_the_last_bit(spec, layout, dtype):
    torch.manual_seed(0)
    weight = torch.randn(layout.shape).to(dtype).requires_grad_(True)
    learned = LearnedGrid.of(first_grid(weight, layout, spec))
    with torch.no_grad():  # as if trained for a while
        learned.stretch.add_(0.3 * torch.randn_like(learned.stretch))
        if learned.shift is not None:
            learned.shift.add_(0.4 * torch.randn_like(learned.shift))
    seen = learned.fake(weight)
    assert seen.dtype is dtype
    assert torch.equal(seen, dequantize(learned.now().tensor(weight)))
    codes = {len(row.unique()) for row in layout.fold(seen.detach()).float()}
    assert max(codes) <= (spec.steps + 1) * (10 if isinstance(spec.granularity, int) else 1)


@given(st.integers(0, 200), st.sampled_from(SPECS[:5]))
def test_no_group_starts_on_a_worse_grid_than_the_best_range(seed, spec):
    weight = torch.randn(5, 24, generator=torch.Generator().manual_seed(seed))
    fitted = first_grid(weight, Layout((5, 24)), spec).grid
    plain = mse_grid(weight, spec)
    errors = [
        (Coded.nearest(weight, grid).values() - weight).square().sum(1) for grid in (fitted, plain)
    ]
    assert bool(errors[0].sum() <= errors[1].sum() * 1.001)


def test_one_bit_starts_at_the_means_of_its_halves():
    weight = torch.randn(3, 4000, generator=torch.Generator().manual_seed(1))
    values = LearnedGrid.of(first_grid(weight, Layout((3, 4000)), QuantSpec(1))).fake(weight)
    for row, seen in zip(weight, values, strict=True):
        low, high = sorted(seen.unique().tolist())
        middle = (low + high) / 2
        assert low == pytest.approx(float(row[row < middle].mean()), rel=0.02)
        assert high == pytest.approx(float(row[row >= middle].mean()), rel=0.02)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("value", [0.0, 1.0, -2.0])
def test_a_weight_of_one_value_has_room_to_grow(spec, value):
    weight = torch.full((4, 8), value)
    learned = LearnedGrid.of(first_grid(weight, Layout((4, 8)), spec))
    assert bool((learned.now().grid.scale > 0).all())
    spread = learned.fake(torch.linspace(-2, 2, 32).reshape(4, 8))
    assert len(spread.unique()) >= 2


def test_a_frozen_weight_leaves_its_grid_alone():
    weight = torch.randn(2, 4)
    learned = LearnedGrid.of(first_grid(weight, Layout((2, 4)), QuantSpec(2)))
    assert not learned.fake(weight).requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_checkpoint_goes_on_with_the_same_values(spec):
    weight = torch.randn(6, 10)
    learned = LearnedGrid.of(first_grid(weight, Layout((6, 10)), spec))
    with torch.no_grad():
        learned.stretch.sub_(0.1)
    again = LearnedGrid.from_state_dict(learned.state_dict(), True, torch.device("cpu"))
    assert torch.equal(again.fake(weight), learned.fake(weight))
    ended = LearnedGrid.from_state_dict(learned.now().state_dict(), True, torch.device("cpu"))
    assert torch.equal(ended.fake(weight), learned.fake(weight))
    assert sum(1 for _ in again.leaves()) == (1 if spec.symmetric else 2)
