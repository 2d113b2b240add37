"""Who clips what: parameters of every accepted form, each once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from clipquant.clip import Norm, Value
from clipquant.clip.assign import Part, as_rule, assign


def params(count: int = 3) -> list[nn.Parameter]:
    return [nn.Parameter(torch.zeros(2)) for _ in range(count)]


@pytest.mark.parametrize("form", ["tensors", "generator", "named", "groups", "named groups"])
def test_every_form_names_the_same_parameters(form: str) -> None:
    a, b, c = params()
    given: Any = {
        "tensors": [a, b, c],
        "generator": (p for p in (a, b, c)),
        "named": [("a", a), ("b", b), ("c", c)],
        "groups": [{"params": [a]}, {"params": [b, c]}],
        "named groups": [{"params": [("a", a)]}, {"params": [("b", b), ("c", c)]}],
    }[form]
    found = assign(given, 1.0)
    assert [id(p) for p in found.params] == [id(a), id(b), id(c)]
    assert found.names == (("a", "b", "c") if "named" in form else ("0", "1", "2"))
    assert found.groups == ((0, 1, 1) if "groups" in form else (0, 0, 0))
    assert found.whole == Part(Value(1.0), (0, 1, 2))


def test_one_tensor_is_a_parameter_too() -> None:
    (only,) = params(1)
    assert assign(only, Norm(1.0)).params == (only,)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_a_tied_parameter_appears_once_where_it_came_first(order: list[int]) -> None:
    pool = params(5)
    found = assign([pool[i] for i in order], 1.0)
    assert [id(p) for p in found.params] == [id(pool[i]) for i in dict.fromkeys(order)]


@given(
    st.lists(st.sampled_from(["main", "own", "none"]), min_size=1, max_size=5),
    st.sets(st.integers(0, 9)),
)
def test_every_chosen_parameter_is_in_one_part_at_most(kinds: list[str], left: set[int]) -> None:
    pool = params(2 * len(kinds))
    override: dict[str, Any] = {"main": {}, "own": {"clip": 0.5}, "none": {"clip": None}}
    groups = [{"params": pool[2 * i : 2 * i + 2], **override[kind]} for i, kind in enumerate(kinds)]
    chosen = {id(p) for i, p in enumerate(pool) if i not in left}
    found = assign(groups, Norm(1.0), chosen=lambda p: id(p) in chosen)
    members = [i for part in found.parts for i in part.members]
    assert len(members) == len(set(members))
    assert set(members) == {
        i for i in range(len(pool)) if i not in left and kinds[i // 2] != "none"
    }
    for part in found.parts:
        for i in part.members:
            assert part.rule == (Norm(1.0) if kinds[i // 2] == "main" else Value(0.5))


def test_names_given_by_id_come_first() -> None:
    a, b, _ = params()
    assert assign([("own", a), ("b", b)], 1.0, {id(a): "layer.weight"}).names == (
        "layer.weight",
        "b",
    )


def test_the_order_is_that_of_the_first_rule() -> None:
    assert assign(params(), Norm(1.0, "inf")).order == float("inf")
    assert assign(params(), Value(1.0)).order == 2.0


def test_a_part_finds_its_own_state_and_no_other() -> None:
    part = Part(Norm(1.0, warmup_steps=3), (0,), "group1.")
    own = part.prefixed({"steps": torch.tensor(2)})
    assert list(own) == ["group1.steps"]
    assert int(part.state({"steps": torch.tensor(7), **own})["steps"]) == 2
    assert int(part.state({})["steps"]) == 0


@pytest.mark.parametrize("rule", [True, "norm", None, object(), Norm])
def test_what_is_no_rule_is_refused(rule: Any) -> None:
    with pytest.raises(TypeError, match="a rule must be a number or an object with the methods"):
        as_rule(rule)


def test_a_module_an_optimizer_and_dicts_are_taken_for_their_parameters() -> None:
    module = nn.Linear(2, 3)
    wanted = [id(module.weight), id(module.bias)]
    optimizer = torch.optim.SGD([{"params": module.parameters(), "clip": 0.5}], lr=0.1)
    for form in (module, optimizer, dict(module.named_parameters()), optimizer.param_groups[0]):
        assert [id(p) for p in assign(form, 1.0).params] == wanted
    assert assign(module, 1.0).names == ("weight", "bias")
    assert assign(optimizer, 1.0).parts[0].rule == Value(0.5)


def test_an_exhausted_iterator_is_told_and_what_is_no_parameter_refused() -> None:
    module = nn.Linear(2, 3)
    module(torch.ones(1, 2)).sum().backward()
    exhausted = module.parameters()
    list(exhausted)
    with pytest.warns(UserWarning, match="exhausted"):
        assign(exhausted, 1.0)
    with pytest.raises(TypeError, match="instead of the gradients"):
        assign([p.grad for p in module.parameters()], 1.0)
    with pytest.raises(TypeError, match="got str"):
        assign(["weight"], 1.0)


def test_a_main_rule_does_not_take_the_state_of_a_group() -> None:
    part = Part(Norm(1.0, warmup_steps=3), (0,))
    assert int(part.state({"group0.steps": torch.tensor(7)})["steps"]) == 0
