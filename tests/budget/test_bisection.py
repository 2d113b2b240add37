"""Bisection is short, tries nothing twice and ends on what held."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from clipquant.budget.bisection import smallest_that_holds


@given(st.integers(1, 300), st.integers(0, 320), st.integers(2, 10))
def test_bisection_is_short_and_ends_on_what_held(count: int, first: int, trials: int) -> None:
    calls = []

    def holds(size: int) -> bool:
        calls.append(size)
        return size >= first

    smallest = smallest_that_holds(holds, range(count), trials)
    assert len(calls) <= trials
    assert len(set(calls)) == len(calls)
    if smallest is None:
        assert first > count - 1
    else:
        assert smallest >= first
        assert smallest in calls
    if trials == 10:
        assert smallest == (first if first < count else None)
