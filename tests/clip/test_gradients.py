"""The gradients of one step: measured once, given without the loss scale."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipquant.clip import AGC, Gradients, Norm, Value, clip_gradients_
from clipquant.clip import gradients as module
from clipquant.clip.gradients import overlaps, writable


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


def test_elements_that_share_memory_are_told_and_copied() -> None:
    expanded = torch.ones(1).expand(3)
    windows = torch.arange(4.0).as_strided((3, 2), (1, 1))
    for shared in (expanded, windows):
        assert overlaps(shared)
        assert torch.equal(writable(shared), shared)
        assert writable(shared).is_contiguous()
    for own in (torch.ones(3, 4).t(), torch.ones(9)[::2], torch.ones(())):
        assert not overlaps(own)
        assert writable(own) is own


@pytest.mark.parametrize("rule", [Value(0.1), Norm(0.1), AGC(0.01), Norm(0.1, scope="tensor")])
def test_what_cannot_be_written_is_written_right(rule: Any) -> None:
    with torch.inference_mode():
        inference = torch.full((3,), 2.0)
    for grad in (torch.full((1,), 2.0).expand(3), inference):
        odd, plain = (nn.Parameter(torch.ones(3)) for _ in range(2))
        odd.grad, plain.grad = grad, torch.full((3,), 2.0)
        clip_gradients_(odd, rule)
        clip_gradients_(plain, rule)
        assert torch.equal(odd.grad, plain.grad)
