"""Modules whose weights processes keep in parts: see sharding_checks.py for what two processes check."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, SingleDeviceStrategy
from torch import nn

from clipquant.callbacks.quantize_checks import check_strategy
from clipquant.callbacks.shares import Left, Share, codes_apart, task_of, wanted
from clipquant.errors import ArgumentError
from clipquant.quant.methods import METHODS
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

SCRIPT = Path(__file__).parent / "sharding_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_with_parts_do_as_one(
    check: str, in_two_processes: Callable[[Path, str], str]
) -> None:
    assert in_two_processes(SCRIPT, check) == ""


class Attached(pl.Trainer):
    """A Trainer of nothing but a strategy: Lightning makes none of these without an accelerator."""

    strategy: Any = None


def trainer_with(strategy: Any) -> Any:
    trainer = object.__new__(Attached)
    trainer.strategy = strategy
    return trainer


def test_strategies_whose_parts_cannot_be_gathered_are_refused() -> None:
    check_strategy(trainer_with(FSDPStrategy()), "best")
    check_strategy(trainer_with(SingleDeviceStrategy()), "best")
    nameless = trainer_with(FSDPStrategy(use_orig_params=False))
    with pytest.raises(ArgumentError, match=r"use_orig_params=False.*Leave use_orig_params out"):
        check_strategy(nameless, "last")
    zero = trainer_with(object.__new__(DeepSpeedStrategy))
    zero.strategy.config = {"zero_optimization": {"stage": 3}}
    with pytest.raises(ArgumentError, match=r"up to stage 2.*stage=2"):
        check_strategy(zero, "last")
    zero.strategy.config = {"zero_optimization": {"stage": 2}}
    check_strategy(zero, "last")
    with pytest.raises(ArgumentError, match=r"weights='best'.*weights='last'"):
        check_strategy(zero, "best")


class Odd(nn.Module):
    """A matrix in a layer that no library knows."""

    def __init__(self) -> None:
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(12, 40))


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict(
        {
            "conv": nn.ConvTranspose2d(6, 8, 3, groups=2),
            "lstm": nn.LSTM(8, 8),
            "words": nn.Embedding(50, 16),
            "attention": nn.MultiheadAttention(16, 2),
            "linear": nn.Linear(64, 40),
            "odd": Odd(),
        }
    )
    with torch.no_grad():
        made["linear"].weight[torch.rand(40, 64) < 0.2] = 0.0  # pruned
    return made


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(8),
        Recipe(4, overrides={"*ih*": 2, "words*": 6}),
        Recipe(3, method="hqq", include=["*.matrix", "*weight*"], exclude=["conv*"]),
        Recipe(levels=8, granularity="tensor", symmetric=False, method="rtn"),
        Recipe(2, method="mse", granularity=32),
    ],
)
def test_each_weight_apart_gets_the_codes_that_it_gets_in_its_model(recipe: Recipe) -> None:
    net = model()
    together = quantize_weights(net, recipe)
    targets = recipe.select(net).targets
    for target in wanted(recipe, targets, with_data=False):
        task = task_of(target, recipe)
        assert not any(True for _ in task.layer.parameters())
        share = task.share_or_leave(target.weight.detach().clone())
        expected = together.tensors[target.name]
        assert isinstance(share, Share)
        assert torch.equal(share.tensor.codes, expected.codes)
        assert torch.equal(share.tensor.scale, expected.scale)
        assert (share.tensor.zero is None) == (expected.zero is None)
        assert share.note == together.notes.get(target.name, "")
        assert share.lookup == (target.name in together.lookups)
        assert share.record.name == target.name
    assert len(targets) == len(together.tensors)


def test_a_weight_that_has_no_codes_stays_as_it_is() -> None:
    net = nn.Linear(64, 4)
    recipe = Recipe(4, method="mse")
    task = task_of(recipe.select(net).targets[0], recipe)
    broken = torch.full((4, 64), torch.nan)
    left = task.share_or_leave(broken)
    assert isinstance(left, Left)
    assert "finite" in left.why
    assert left.tensor is broken


def test_only_methods_that_look_at_one_weight_at_a_time_are_shared() -> None:
    class Own:
        name, needs_data = "own", False

        def solve(self, problem: Any) -> Any: ...

    net = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 8))
    assert [name for name in METHODS if codes_apart(METHODS[name])] == ["auto", "rtn", "mse", "hqq"]
    for recipe, with_data, count in (
        (Recipe(4), True, 0),  # decided by batches
        (Recipe(4), False, 2),
        (Recipe(8), True, 2),
        (Recipe(4, method="mse"), True, 2),
        (Recipe(4, method="gptq"), True, 0),
        (Recipe(4, method=Own()), False, 0),
    ):
        assert len(wanted(recipe, recipe.select(net).targets, with_data)) == count
