"""Schedules: from nothing to all, never back."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipquant.quant.training.schedule import SCHEDULES, cubic


@pytest.mark.parametrize("name", SCHEDULES)
@given(first=st.floats(0, 1), second=st.floats(0, 1))
def test_sparsity_never_falls_and_ends_at_all(name, first, second):
    schedule = SCHEDULES[name]
    low, high = sorted((first, second))
    assert 0 <= schedule(low) <= schedule(high) <= 1
    assert schedule(1.0) == 1


@given(st.floats(0, 1))
def test_cubic_is_the_formula_of_its_paper(done):
    initial, final = 0.0, 1.0
    assert cubic(done) == pytest.approx(final + (initial - final) * (1 - done) ** 3)
