"""Norms that are read later are those of the time they were taken."""

from __future__ import annotations

import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipquant.clip import Gradients, Norm
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign
from clipquant.clip.measured import Measured


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, math.inf])
def test_joined_norms_are_those_of_the_parts(order: float) -> None:
    parts = [torch.randn(5), torch.randn(2, 3)]
    joined = Measured(torch.cat([p.flatten() for p in parts]), order, (5, 6), factor=2.0)
    each = [2 * float(torch.linalg.vector_norm(p, order)) for p in parts]
    assert joined.each.tolist() == pytest.approx(each, rel=1e-5)
    whole = torch.linalg.vector_norm(torch.tensor(each), order)
    assert joined.total == pytest.approx(float(whole), rel=1e-5)
    assert joined.scaled(0.5).total == pytest.approx(float(whole) / 2, rel=1e-5)


def test_a_limit_is_meant_in_the_units_of_the_norms() -> None:
    joined = Measured(torch.tensor([8.0, 2.0]), 2.0, (2,), factor=0.5)
    assert joined.limited(3.0).total == pytest.approx(math.hypot(3.0, 1.0))


@pytest.mark.parametrize("count", [1, 3])
def test_small_gradients_may_change_before_their_norms_are_read(count: int) -> None:
    tensors = [torch.full((4,), 2.0) for _ in range(count)]
    before = Gradients(tensors, small=True).measured()
    for tensor in tensors:
        tensor.zero_()
    assert before.total == pytest.approx(4.0 * math.sqrt(count))
    assert pickle.loads(pickle.dumps(before)).each.tolist() == [4.0] * count


def test_squares_that_overflow_are_finite() -> None:
    joined = Measured(torch.tensor([3e30, 4e30]), 2.0, (1, 1))
    assert joined.total == pytest.approx(5e30, rel=1e-6)


class Reads(TorchDispatchMode):
    """Counts the scalars that are read, each of which waits for the device."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", ["skip", "propagate"])
@pytest.mark.parametrize("size", [20, 7000])
def test_a_norm_reads_one_scalar_a_step(size: int, policy: Any) -> None:
    params = [nn.Parameter(torch.ones(size, 10)) for _ in range(12)]
    for param in params:
        param.grad = torch.randn_like(param)
    assignment = assign(params, Norm(1.0))
    with Reads() as reads:
        record = clip_assigned_(assignment, on_nonfinite=policy)
    assert record.clipped
    assert reads.count == 1


def test_a_total_whose_squares_overflow_is_finite() -> None:
    assert Measured(torch.tensor([3e30, 4e30])).total == pytest.approx(5e30, rel=1e-6)
    assert Measured(torch.tensor([3e30, math.inf])).total == math.inf
    assert Measured(torch.zeros(0)).total == 0.0
