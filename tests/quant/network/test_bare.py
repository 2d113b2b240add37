"""A module without wrappers: its author's keys, one that can be copied, and every object back in its place."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from clipquant.quant.network.bare import bare, bare_key, inner_of


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


def wrapped() -> nn.Module:
    body = nn.Sequential(compiled(checkpoint_wrapper(nn.Linear(3, 3))), nn.ReLU(), nn.Linear(3, 3))
    body[2].weight = inner_of(body[0]).weight  # tied across a wrapper
    return nn.ModuleDict({"body": compiled(body), "plain": nn.Linear(3, 1)})


def test_keys_are_the_authors_and_everything_comes_back() -> None:
    model = wrapped()
    parts = dict(model.named_modules())
    tensors = {name: id(t) for name, t in model.state_dict(keep_vars=True).items()}
    with bare(model):
        keys = list(model.state_dict())
        copied = copy.deepcopy(model)
        assert all(type(p).__module__.startswith("torch.nn.") for p in copied.modules())
        assert copied["body"][2].weight is copied["body"][0].weight
    assert keys == [
        "body.0.weight", "body.0.bias", "body.2.weight", "body.2.bias", "plain.weight", "plain.bias",
    ]  # fmt: skip
    assert dict(model.named_modules()) == parts
    assert {name: id(t) for name, t in model.state_dict(keep_vars=True).items()} == tensors
    assert [bare_key(name) for name in tensors] == keys


def test_tensors_are_held_wherever_those_they_replace_are() -> None:
    model = wrapped()
    weight, x = 5 * torch.eye(3), torch.ones(1, 3)
    before = inner_of(model["body"])(x)
    with bare(model, {"body.0.weight": weight}):
        held = model["body"]
        assert held[2].weight is held[0].weight
        assert held[0].weight.data_ptr() == weight.data_ptr()
        assert not torch.equal(held(x), before)
    assert torch.equal(inner_of(model["body"])(x), before)


def test_it_is_put_back_after_an_error() -> None:
    model = wrapped()
    keys = list(model.state_dict())
    with pytest.raises(KeyError), bare(model, {"plain.weight": torch.zeros(1, 3)}):
        raise KeyError
    assert list(model.state_dict()) == keys
    assert bool(model["plain"].weight.any())


def test_hooks_of_an_engine_are_left_out_and_those_of_users_are_kept() -> None:
    layer, calls = nn.Linear(2, 2), []

    def engines(*_: Any) -> None:
        calls.append("engine")

    engines.__module__ = "torch.distributed.fsdp._fully_shard"
    first = layer.register_forward_pre_hook(engines)
    layer.register_forward_pre_hook(lambda *_: calls.append("user"))
    with bare(layer):
        layer(torch.ones(1, 2))
    assert calls == ["user"]
    layer(torch.ones(1, 2))
    assert calls == ["user", "engine", "user"]
    first.remove()
    layer(torch.ones(1, 2))
    assert calls[3:] == ["user"]
