"""The record of one call: its coefficient follows from its norms."""

from __future__ import annotations

import pytest
import torch

from clipquant.clip import ClipRecord
from clipquant.clip.measured import Measured


def record(before: float | None, after: float | None) -> ClipRecord:
    norms = [None if n is None else Measured(torch.tensor([n])) for n in (before, after)]
    return ClipRecord(before=norms[0], after=norms[1])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [(4.0, 1.0, 0.25), (4.0, 4.0, 1.0), (0.0, 0.0, 1.0), (None, None, None), (2.0, None, None)],
)
def test_the_coefficient_is_the_share_of_the_norm_that_is_left(before, after, expected) -> None:
    assert record(before, after).clip_coef == expected
