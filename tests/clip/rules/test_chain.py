"""Rules one after the other: as by hand, with their own states, and folded where the last one folds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from clipquant.clip import AGC, AutoClip, Chain, Gradients, Indicator, Norm, Value, clip_gradients_
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign

PAIRS = [
    (AGC(0.01), Norm(0.02)),
    (Value(0.5), Norm(1.0)),
    (Norm(1.0), Value(0.1)),
    (Norm(1.0, scope="tensor"), AutoClip(50)),
    (Indicator(0.5), AGC(0.1)),
]


def params(large: bool = False) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(30, 20), (7,), (300, 400) if large else (3, 4)]
    made = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for param in made:
        param.grad = torch.randn(param.shape, generator=generator)
    return made


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_a_chain_is_its_rules_by_hand(pair: Any, large: bool) -> None:
    chained, by_hand = params(large), params(large)
    record = clip_gradients_(chained, Chain(*pair), measure=True)
    first = clip_gradients_(by_hand, pair[0], measure=True)
    second = clip_gradients_(by_hand, pair[1], measure=True)
    for a, b in zip(chained, by_hand, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-9)
    assert record.grad_norm == pytest.approx(first.grad_norm, rel=1e-5)
    assert record.grad_norm_clipped == pytest.approx(second.grad_norm_clipped, rel=1e-5)


@pytest.mark.parametrize("pair", PAIRS, ids=repr)
def test_its_own_methods_change_nothing_and_agree(pair: Any) -> None:
    chained, given = params(), params()
    rule = Chain(list(pair))
    grads = Gradients([p.grad for p in given])
    plan, state = rule.plan(grads, given, rule.init())
    assert all(torch.equal(g, p.grad) for g, p in zip(grads, params(), strict=True))
    clip_gradients_(chained, rule)
    for param, twin in zip(chained, given, strict=True):
        own = rule.clip(twin.grad, twin, plan)
        torch.testing.assert_close(param.grad, own.detach(), rtol=1e-6, atol=1e-9)
    assert state.keys() >= rule.init().keys()


def test_the_last_norm_is_left_to_a_step_that_folds() -> None:
    given = params()
    rule = Chain(AGC(0.01), Norm(0.02))
    record = clip_assigned_(assign(given, rule), defer=True)
    assert rule.folds
    norm = float(torch.cat([p.grad.flatten() for p in given]).norm())
    assert record.deferred == pytest.approx(0.02 / norm, rel=1e-3)
    assert record.grad_norm_clipped == pytest.approx(0.02, rel=1e-3)


def test_each_rule_keeps_a_state_of_its_own() -> None:
    rule, state = Chain(AutoClip(50), AutoClip(10, window=2)), None
    for _ in range(3):
        state = clip_gradients_(params(), rule, state).state
    assert (len(state["0.history"]), len(state["1.history"])) == (3, 2)


def test_chains_of_chains_are_one_and_what_is_no_rule_is_refused() -> None:
    assert Chain(Chain(Value(1.0), AGC()), Norm(1.0)) == Chain([Value(1.0), AGC(), Norm(1.0)])
    with pytest.raises(TypeError, match=r"got 1.0: give e.g. AGC\(0.01\)"):
        Chain(AGC(), 1.0)
    with pytest.raises(ValueError, match="rules must hold a rule"):
        Chain([])
