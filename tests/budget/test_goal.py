"""What can be asked, in any spelling, and what is missed by how much."""

from __future__ import annotations

import math
from typing import Any

import pytest

from clipquant.budget import BudgetError, size_in_bytes
from clipquant.budget.goal import Goal, check_budget, missed_size, refuse_below, spare_bytes
from clipquant.errors import ArgumentError


def test_sizes_are_read_in_any_spelling() -> None:
    for text in ("300kB", "300 kb", "300KB", " 300 k ", "300000", "0.3 MB"):
        assert size_in_bytes(text, 0) == 300_000
    assert size_in_bytes("1KiB", 0) == 1024


@pytest.mark.parametrize(
    "size", [0, -5, "lots", "300 bananas", "", "-3kB", "0kB", 1.5, -0.5, True, None, [300]]
)
def test_what_is_no_size_is_quoted(size: Any) -> None:
    with pytest.raises(ArgumentError, match="max_size must be") as told:
        size_in_bytes(size, 1000)
    assert repr(size) in str(told.value)


def test_a_share_is_one_of_the_float_bytes() -> None:
    assert size_in_bytes(0.25, 1001) == 250
    assert size_in_bytes(3e5, 1001) == 300_000


@pytest.mark.parametrize("size", [1.0, 2.0, 999.0])
def test_what_may_be_a_share_or_bytes_is_refused(size: float) -> None:
    with pytest.raises(
        ArgumentError, match=rf"max_size={size} is neither.*Write '{size:g} kB' or"
    ) as told:
        size_in_bytes(size, 10**6)
    assert "0.25" in str(told.value)


@pytest.mark.parametrize("drop", [-0.1, math.nan, math.inf, True, "1"])
def test_a_drop_is_a_finite_number(drop: Any) -> None:
    with pytest.raises(ArgumentError, match="max_drop must be a finite number"):
        check_budget(drop, None)
    check_budget(0, None)
    check_budget(None, "300kB")


def test_a_size_below_the_smallest_is_refused_and_the_smallest_is_not() -> None:
    refuse_below(300, 300)
    with pytest.raises(
        BudgetError, match="299 bytes is below the smallest possible file, 300 bytes"
    ):
        refuse_below(299, 300)


def test_only_a_larger_file_misses_its_size() -> None:
    asked = Goal(0.1, 300, "acc", "max")
    assert missed_size(asked, 300) == ""
    assert "needs 301 bytes" in missed_size(asked, 301)
    assert missed_size(Goal(0.1, None, "acc", "max"), 10**9) == ""


def test_more_weights_and_metrics_say_more() -> None:
    assert spare_bytes(10, {}) > spare_bytes(9, {})
    assert spare_bytes(9, {"acc": 0.5}) > spare_bytes(9, {})
    assert spare_bytes(9, {}, 5000) < spare_bytes(10**4, {}, 10**6) < spare_bytes(10**4, {})
