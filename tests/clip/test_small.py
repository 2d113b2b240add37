"""Small gradients take few calls, and come out as torch clamps them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from clipquant.clip import Value, clip_gradients_
from clipquant.clip.assign import assign
from clipquant.clip.small import are_plain, clamp_small_, small_sizes


def params(*grads: torch.Tensor) -> list[nn.Parameter]:
    found = [nn.Parameter(torch.zeros_like(grad)) for grad in grads]
    for param, grad in zip(found, grads, strict=True):
        param.grad = grad
    return found


@pytest.mark.parametrize(
    "grad",
    [
        None,
        torch.ones(2).double(),
        torch.ones(2).half(),
        torch.ones(1).expand(3),
        torch.ones(3, 2).t(),
        torch.ones(2).to_sparse(),
        torch.ones(2, requires_grad=True),
        torch.ones(2, device="meta"),
        nn.Parameter(torch.ones(2)),
    ],
    ids=lambda grad: "none" if grad is None else f"{grad.dtype} {grad.layout} {grad.device}",
)
def test_gradients_of_any_other_kind_are_not_plain(grad: Any) -> None:
    assert are_plain([torch.ones(2), torch.ones(2, 3)])
    assert not are_plain([torch.ones(2), grad])
    assert not are_plain([])


def test_inference_gradients_are_not_plain() -> None:
    with torch.inference_mode():
        grad = torch.ones(2)
    assert not are_plain([grad])


def test_sizes_are_those_of_gradients_that_are_small_together() -> None:
    assert small_sizes([torch.ones(2), torch.ones(2, 3)]) == (2, 6)
    assert small_sizes([torch.ones(1 << 15), torch.ones((1 << 15) + 1)]) == ()
    assert small_sizes([torch.ones(2), torch.ones(0)]) == ()


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("count", [1, 3])
def test_it_clamps_to_the_bit_and_keeps_norms_of_before(
    watch: bool, measure: bool, count: int
) -> None:
    torch.manual_seed(0)
    grads = [3 * torch.randn(4, 2) for _ in range(count)]
    own = params(*[grad.clone() for grad in grads])
    record = clamp_small_(assign(own, 1.0), watch, measure)
    assert record is not None
    assert record.clipped
    assert all(
        torch.equal(p.grad, g.clamp(-1, 1))  # type: ignore[arg-type]
        for p, g in zip(own, grads, strict=True)
    )
    if measure:
        assert record.norms.tolist() == pytest.approx([float(g.norm()) for g in grads])  # type: ignore[union-attr]
        clamped = torch.cat([g.clamp(-1, 1).flatten() for g in grads])
        assert record.grad_norm_clipped == pytest.approx(float(clamped.norm()))
    else:
        assert record.grad_norm is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_who_can_name_it(bad: float) -> None:
    own = params(torch.tensor([5.0, bad]))
    assert clamp_small_(assign(own, 1.0), watch=True, measure=True) is None
    assert own[0].grad[0] == 5.0  # type: ignore[index]
    assert clip_gradients_(own, 1.0, on_nonfinite="skip").nonfinite == ("0",)


def test_within_is_untouched_and_said_so() -> None:
    own = params(torch.tensor([1.0, -1.0]))
    record = clamp_small_(assign(own, Value(1.0)), watch=True, measure=True)
    assert record is not None
    assert not record.clipped
    assert record.after is record.before
