"""Blocks hold every element once."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from clipquant.clip.blocks import blocks, gather_norms
from clipquant.clip.norms import value_norms

SIZES = st.lists(st.integers(0, 70), min_size=1, max_size=12)


@given(SIZES, st.booleans(), st.integers(1, 50))
def test_every_element_is_in_one_block_and_shares_memory(
    sizes: list[int], split: bool, size: int
) -> None:
    tensors = [torch.zeros(n) for n in sizes]
    with patch("clipquant.clip.blocks._BLOCK", size):
        found = list(blocks(tensors, split))
    for block in found:
        assert len(block.values) == 1 or sum(v.numel() for v in block.values) <= size
        assert not split or all(v.numel() <= size for v in block.values)
        for values in block.values:
            values.add_(1.0)
    assert all(bool((tensor == 1.0).all()) for tensor in tensors)


@given(SIZES, st.integers(1, 50), st.sampled_from([1.0, 2.0, math.inf]))
def test_norms_of_the_pieces_give_norms_of_the_gradients(
    sizes: list[int], size: int, order: float
) -> None:
    tensors = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in sizes]
    with patch("clipquant.clip.blocks._BLOCK", size):
        pieces = [(block, value_norms(block.values, order)) for block in blocks(tensors)]
    found = gather_norms(pieces, len(tensors), order)
    expected = [
        float(torch.linalg.vector_norm(t.double(), order)) if len(t) else 0.0 for t in tensors
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_a_large_tensor_that_cannot_be_viewed_flat_stays_whole() -> None:
    with patch("clipquant.clip.blocks._BLOCK", 100):
        (block,) = blocks([torch.zeros(30, 40).t()])
    assert block.values[0].shape == (40, 30)
