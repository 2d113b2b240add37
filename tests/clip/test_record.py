"""The record of one call: its coefficient follows from its norms."""

from __future__ import annotations

import pytest

from clipquant.clip import ClipRecord


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(4.0, 1.0, 0.25), (4.0, 4.0, 1.0), (0.0, 0.0, 1.0), (None, None, None), (2.0, None, None)],
)
def test_the_coefficient_is_the_share_of_the_norm_that_is_left(before, after, expected) -> None:
    assert ClipRecord(grad_norm=before, grad_norm_clipped=after).clip_coef == expected
