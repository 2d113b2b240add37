"""Norms measured later are those of gradients that have not changed; others are not told."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from clipquant.clip import Value
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign
from clipquant.clip.later import Later


def big(count: int = 2) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(300, 300)) for _ in range(count)]
    for param in params:
        param.grad = 3 * torch.randn(300, 300)
    return params


def test_they_are_measured_once_somebody_asks() -> None:
    params = big()
    record: Any = clip_assigned_(assign(params, Value(1.0)), later=True)
    assert isinstance(record.after, Later)
    before = record.grad_norm
    expected = [float(param.grad.double().norm()) for param in params]  # type: ignore[union-attr]
    assert record.norms_clipped.tolist() == pytest.approx(expected, rel=1e-6)
    for param in params:
        param.grad = None
    gc.collect()
    assert record.grad_norm_clipped == pytest.approx(sum(e * e for e in expected) ** 0.5, rel=1e-6)
    assert record.grad_norm_clipped < before
    assert record.after.scaled(2.0).total == pytest.approx(2 * record.grad_norm_clipped)
    assert float(record.after.norm) == pytest.approx(record.grad_norm_clipped)


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_gradients_that_are_gone_or_changed_are_not_measured(change: str) -> None:
    params = big()
    record: Any = clip_assigned_(assign(params, Value(1.0)), later=True)
    if change == "gone":
        params[1].grad = None
        gc.collect()
    else:
        params[1].grad.mul_(2)  # type: ignore[union-attr]
    assert record.grad_norm > 0
    assert record.grad_norm_clipped is None
    assert record.norms_clipped is None
    assert record.clip_coef is None
    assert pickle.loads(pickle.dumps(record)).grad_norm_clipped is None


def test_a_record_is_sent_with_its_norms() -> None:
    params = big()
    record: Any = clip_assigned_(assign(params, Value(1.0)), later=True)
    sent = pickle.loads(pickle.dumps(record))
    assert sent.grad_norm_clipped == pytest.approx(record.grad_norm_clipped)


def test_nobody_keeps_the_gradients_alive() -> None:
    params = big(1)
    record: Any = clip_assigned_(assign(params, Value(1.0)), later=True)
    assert gc.get_referrers(params[0].grad) == []
    assert record.after.known


def test_without_leave_nothing_is_left_for_later() -> None:
    params = big()
    record: Any = clip_assigned_(assign(params, Value(1.0)))
    assert not isinstance(record.after, Later)
    for param in params:
        param.grad = None
    assert record.grad_norm_clipped > 0
