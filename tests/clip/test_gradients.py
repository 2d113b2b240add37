"""The gradients of one step: measured once, given without the loss scale."""

from __future__ import annotations

import pytest
import torch

from clipquant.clip import Gradients
from clipquant.clip import gradients as module


def test_norms_are_measured_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counting(tensors: object, order: float) -> torch.Tensor:
        calls.append(order)
        return torch.tensor([3.0, 4.0])

    monkeypatch.setattr(module, "tensor_norms", counting)
    grads = Gradients([torch.zeros(2), torch.zeros(3)])
    assert not grads.measured()
    assert float(grads.norm()) == 5.0
    assert grads.norms().tolist() == [3.0, 4.0]
    assert grads.select([1]).norms().tolist() == [4.0]
    assert calls == [2.0]
    assert grads.unmeasured().norms(1.0).tolist() == [3.0, 4.0]
    assert calls == [2.0, 1.0]


def test_norms_are_given_without_the_loss_scale() -> None:
    grads = Gradients([torch.tensor([3.0, 4.0]) * 1024], loss_scale=1024.0)
    assert float(grads.norm()) == 5.0
    assert float(grads.select([0]).unmeasured().norm()) == 5.0


def test_a_selection_keeps_groups_and_positions() -> None:
    grads = Gradients([torch.ones(1), torch.ones(2), torch.ones(3)], [0, 1, 1], [4, 7, 9])
    part = grads.select([2, 0])
    assert (part.groups, part.positions) == ((1, 0), (9, 4))
    assert [len(grad) for grad in part] == [3, 1]
    assert len(grads) == 3
    assert [len(grad) for grad in grads[1:]] == [2, 3]
