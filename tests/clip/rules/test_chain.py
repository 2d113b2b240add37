"""Several rules in a row: each sees what the one before it left, and keeps a state of its own."""

import pytest
import torch

from clipquant import clip_gradients_
from clipquant.clip import Chain, Norm, Value, ZClip


def parameters():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.randn(3, 4))]
    for param in params:
        param.grad = torch.randn_like(param) * 3
    return params


def test_a_chain_is_its_rules_one_after_the_other():
    chained, single = parameters(), parameters()
    clip_gradients_(chained, Chain(Value(0.5), Norm(1.0)))
    for rule in (Value(0.5), Norm(1.0)):
        clip_gradients_(single, rule)
    for one, other in zip(chained, single, strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=1e-6)
    assert sum(float(p.grad.square().sum()) for p in chained) <= 1.0 + 1e-5


def test_each_rule_keeps_a_state_of_its_own():
    rule = Chain(ZClip(), Value(0.5), ZClip())
    state = rule.init()
    prefixes = {key.split(".")[0] for key in state}
    assert prefixes == {"0", "2"}


def test_chains_within_chains_are_one_chain():
    assert Chain(Chain(Value(1.0), Norm(2.0)), Value(0.5)) == Chain(
        [Value(1.0), Norm(2.0), Value(0.5)]
    )


def test_what_is_no_rule_and_nothing_at_all_are_refused():
    with pytest.raises(TypeError, match=r"got 1\.0: .*a number c is Value\(c\)"):
        Chain(Value(1.0), 1.0)
    with pytest.raises(ValueError, match="must hold a rule, got none"):
        Chain([])
