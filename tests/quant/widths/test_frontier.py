"""The allocation: exact sizes, the best of all at its size."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from clipquant.quant.widths.frontier import Choices, frontier


def losses(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, 1, generator=generator, dtype=torch.float64) * 10
    noise = 0.7 + 0.6 * torch.rand(rows, 9, generator=generator, dtype=torch.float64)
    return scale * 4.0 ** -torch.arange(9, dtype=torch.float64) * noise


def spent(choices: dict[str, Choices], bits: dict[str, Tensor]) -> tuple[int, float]:
    size = sum(choices[n].row_bytes(int(b)) for n, row in bits.items() for b in row)
    loss = sum(
        float(choices[n].losses[i, int(b)]) for n, row in bits.items() for i, b in enumerate(row)
    )
    return size, loss


@given(st.integers(0, 999), st.integers(0, 60))
def test_no_allocation_of_the_same_size_is_much_better(seed: int, budget: int) -> None:
    choices = {"w": Choices(8, losses(2, seed)), "v": Choices(16, losses(1, seed + 1))}
    size, loss = spent(choices, frontier(choices).fill(budget))
    assert size <= budget
    best = min(
        spent(choices, {"w": torch.tensor([a, b]), "v": torch.tensor([c])})[1]
        for a, b, c in itertools.product(range(9), repeat=3)
        if a + b + 2 * c <= max(budget - 2, 0)
    )
    assert loss <= best + 1e-12  # greedy is optimal up to less than one of the largest steps


@given(st.integers(0, 99), st.floats(0.02, 1.0))
def test_the_budget_is_used_to_within_the_smallest_step(seed: int, share: float) -> None:
    choices = {"w": Choices(100, losses(64, seed)), "v": Choices(9, losses(16, seed))}
    edge = frontier(choices)
    budget = int(share * edge.most_bytes)
    size, _ = spent(choices, edge.fill(budget))
    assert budget - 130 <= size <= budget


def test_dead_rows_get_no_bits_and_given_widths_stay() -> None:
    table = losses(4, 0)
    table[1] = 0
    choices = {"w": Choices(10, table), "given": Choices(10, losses(3, 1), (4,))}
    edge = frontier(choices)
    bits = edge.fill(edge.most_bytes)
    assert bits["w"][1] == 0
    assert (bits["w"][[0, 2, 3]] > 5).all()
    assert bits["given"].tolist() == [4, 4, 4]
    assert edge.least_bytes == 3 * 5
    with pytest.raises(ValueError, match="at least 15 bytes; got 14"):
        edge.fill(14)
