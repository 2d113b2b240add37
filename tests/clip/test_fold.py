"""Clipping inside a fused step: equal to clipping before it, and gone after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, RMSprop

from clipquant.clip.fold import can_fold, fold_, unfold_, unfold_after_step

FUSED: list[tuple[Any, dict[str, Any]]] = [
    (SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    (Adam, {"lr": 0.1}),
    (AdamW, {"lr": 0.1}),
    (Adagrad, {"lr": 0.1}),
]


class OwnStep(AdamW):
    """Might scale its gradients in any way."""


def weights(count: int = 2) -> list[nn.Parameter]:
    return [nn.Parameter(torch.arange(3.0) + i) for i in range(count)]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (AdamW(weights(), fused=True), True),
        (SGD(weights(), lr=0.1, fused=True), True),
        (AdamW(weights()), False),
        (AdamW(weights(), foreach=True), False),
        (RMSprop(weights()), False),
        (OwnStep(weights(), fused=True), False),
        (AdamW([{"params": weights()}, {"params": weights(), "fused": False}], fused=True), False),
    ],
)
def test_only_a_wholly_fused_optimizer_of_torch_folds(optimizer: Any, expected: bool) -> None:
    assert can_fold(optimizer) is expected


@pytest.mark.parametrize(("kind", "settings"), FUSED)
@pytest.mark.parametrize("coefficient", [1.0, 0.3, 1e-6])
def test_a_folded_step_is_a_step_with_scaled_gradients(
    kind: Any, settings: dict[str, Any], coefficient: float
) -> None:
    ours, theirs = weights(), weights()
    folded, plain = kind(ours, fused=True, **settings), kind(theirs, **settings)
    unfold_after_step(folded)
    for step in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.tensor([3.0, -4.0, 0.5]) * (step + 1)
            b.grad = a.grad * coefficient
        fold_(folded, coefficient, torch.device("cpu"))
        folded.step()
        plain.step()
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-12)


@given(st.floats(1e-30, 1.0))
def test_a_fold_never_amplifies(coefficient: float) -> None:
    optimizer = SGD(weights(), lr=1.0, fused=True)
    fold_(optimizer, coefficient, torch.device("cpu"))
    assert float(optimizer.grad_scale) >= 1.0


def test_what_was_folded_is_gone_after_the_step_and_on_request() -> None:
    params = weights()
    optimizer = SGD(params, lr=1.0, fused=True)
    handle = unfold_after_step(optimizer)
    fold_(optimizer, 0.5, torch.device("cpu"))
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert not hasattr(optimizer, "grad_scale")
    fold_(optimizer, 0.5, torch.device("cpu"))
    unfold_(optimizer)
    unfold_(optimizer)
    before = copy.deepcopy([p.detach() for p in params])
    for param in params:
        param.grad = torch.ones(3)
    optimizer.step()
    assert all(torch.equal(p, b - 1.0) for p, b in zip(params, before, strict=True))
    handle.remove()
    assert not optimizer._optimizer_step_post_hooks


def test_a_grad_scalers_step_is_left_to_the_scaler() -> None:
    optimizer = SGD(weights(), lr=1.0, fused=True)
    unfold_after_step(optimizer)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.found_inf = torch.tensor(0.0)
    for param in optimizer.param_groups[0]["params"]:
        param.grad = torch.ones(3)
    optimizer.step()
    assert float(optimizer.grad_scale) == 2.0
