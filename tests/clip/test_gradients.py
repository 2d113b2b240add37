"""The gradients of one step: measured once, given without the loss scale."""

from __future__ import annotations

import pytest
import torch

from clipquant.clip import Gradients
from clipquant.clip import gradients as module
from clipquant.clip.gradients import writable


def test_norms_are_measured_once_however_many_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def counting(tensors: object, order: float) -> torch.Tensor:
        calls.append(order)
        return torch.tensor([3.0, 4.0])

    monkeypatch.setattr(module, "tensor_norms", counting)
    grads = Gradients([torch.zeros(2), torch.zeros(3)])
    assert not grads.knows()
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


def test_gradients_are_made_writable_only_where_they_have_to_be() -> None:
    plain = torch.ones(3)
    assert writable(plain) is plain
    indices = torch.tensor([[1, 1]])
    twice = torch.sparse_coo_tensor(indices, torch.tensor([1.0, 2.0]), (3,), check_invariants=True)
    assert writable(twice).values().tolist() == [3.0]
    lazy = torch.tensor([1 + 2j]).conj()
    assert not writable(lazy).is_conj()
    assert writable(lazy).tolist() == [1 - 2j]
