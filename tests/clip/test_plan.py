"""Plans carried out in place: equal to each rule's own `clip`, silent where nothing changes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from clipquant.clip import AGC, Indicator, Norm, Value, clip_gradients_
from clipquant.clip.apply import gather_
from clipquant.clip.assign import assign

SHAPES = st.lists(st.lists(st.integers(0, 5), min_size=0, max_size=3), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**31 - 1)


def parameters(shapes: list[list[int]], seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)
    return params


def gradients(params: list[nn.Parameter]) -> list[Tensor]:
    return [param.grad.clone() for param in params if param.grad is not None]


@given(SHAPES, SEEDS, st.sampled_from(["value", "norm", "tensor", "group", "agc", "indicator"]))
def test_what_is_written_is_what_clip_returns(
    shapes: list[list[int]], seed: int, kind: str
) -> None:
    rule: Any = {
        "value": Value(0.3),
        "norm": Norm(0.3),
        "tensor": Norm(0.3, scope="tensor"),
        "group": Norm(0.3, math.inf, scope="group"),
        "agc": AGC(0.1),
        "indicator": Indicator(0.3),
    }[kind]
    params = parameters(shapes, seed)
    twins = parameters(shapes, seed)
    grads = gather_(assign(twins, rule), 1.0)
    plan, _ = rule.plan(grads, params, rule.init())
    expected = [rule.clip(g, p, plan) for g, p in zip(grads, params, strict=True)]
    before = gradients(params)
    assert all(torch.equal(a, b) for a, b in zip(grads, before, strict=True)), (
        "a plan changes nothing"
    )
    clip_gradients_(params, rule, on_nonfinite="skip", measure=True)
    for param, e in zip(params, expected, strict=True):
        torch.testing.assert_close(param.grad, e.detach(), rtol=1e-7, atol=0)


class Keep:
    """A rule of a user's own that returns some gradients as they are."""

    local = True

    def init(self) -> dict[str, Tensor]:
        return {}

    def plan(self, grads: Any, params: Any, state: Any) -> tuple[None, Any]:
        return None, state

    def clip(self, grad: Tensor, param: Tensor, plan: None) -> Tensor:
        return grad if grad.numel() < 3 else grad + 1


def test_a_users_rule_is_measured_and_judged_like_any_other() -> None:
    params = parameters([[2], [3]], 0)
    before = gradients(params)
    record = clip_gradients_(params, Keep(), on_nonfinite="skip", measure=True)
    assert record.clipped
    assert torch.equal(params[0].grad, before[0])
    assert torch.equal(params[1].grad, before[1] + 1)
    assert record.norms.tolist() == pytest.approx([float(g.norm()) for g in before])
    assert record.norms_clipped.tolist() == pytest.approx([float(p.grad.norm()) for p in params])
    params[1].grad[0] = math.nan
    assert clip_gradients_(params, Keep(), on_nonfinite="skip").nonfinite == ("1",)


class Misshapen(Keep):
    """Returns for its last gradient what does not fit."""

    def clip(self, grad: Tensor, param: Tensor, plan: None) -> Tensor:
        return grad + 1 if grad.numel() < 3 else grad[:1]


def test_a_result_that_does_not_fit_is_refused_before_any_gradient_changes() -> None:
    params = parameters([[2], [3]], 0)
    before = gradients(params)
    with pytest.raises(ValueError, match=r"Misshapen.clip must return .* shape \(3,\), got \(1,\)"):
        clip_gradients_(params, Misshapen())
    assert all(torch.equal(p.grad, b) for p, b in zip(params, before, strict=True))
