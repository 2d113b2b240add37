"""Non-finite gradients: found exactly, zeroed exactly."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.clip import Gradients, clip_gradients_
from clipquant.clip.finite import POLICIES, check_policy, nonfinite_members, zero_nonfinite_

ANY = st.floats(width=32)  # NaN, infinities and the largest finite numbers among them
LISTS = st.lists(st.lists(ANY, max_size=6), min_size=1, max_size=5)


@given(LISTS, st.sampled_from([1.0, 2.0, math.inf]))
def test_exactly_the_gradients_with_a_bad_element_are_found(
    lists: list[list[float]], order: float
) -> None:
    grads = Gradients([torch.tensor(values) for values in lists])
    expected = tuple(i for i, values in enumerate(lists) if not all(map(math.isfinite, values)))
    assert nonfinite_members(grads, order) == expected


@given(st.lists(ANY, max_size=8))
def test_finite_elements_stay_bit_for_bit_and_all_others_become_zero(values: list[float]) -> None:
    grad = torch.tensor(values)
    expected = torch.tensor([v if math.isfinite(v) else 0.0 for v in values])
    assert torch.equal(zero_nonfinite_(grad), expected)


def test_zeroing_reaches_sparse_and_complex_values() -> None:
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[0, 2]]), torch.tensor([math.nan, 3.0]), (4,), check_invariants=True
    ).coalesce()
    assert zero_nonfinite_(sparse).to_dense().tolist() == [0.0, 0.0, 3.0, 0.0]
    numbers = torch.tensor([complex(math.nan, 1.0), 1 + 2j, complex(0.0, math.inf)])
    assert zero_nonfinite_(numbers).tolist() == [0j, 1 + 2j, 0j]


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_is_accepted(policy: Any) -> None:
    assert check_policy(policy) == policy


def test_a_bad_policy_is_refused() -> None:
    with pytest.raises(ValueError, match=r"on_nonfinite must be one of .* got 'leave'"):
        clip_gradients_([], 1.0, on_nonfinite="leave")  # type: ignore[arg-type]
