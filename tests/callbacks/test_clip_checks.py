"""What GradientClipCallback refuses, each with the value received and a remedy."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn

from clipquant import GradientClipCallback
from clipquant.callbacks.clip_checks import (
    as_count,
    as_globs,
    as_indices,
    as_limit,
    check_globs,
    check_indices,
    check_optimizer,
    refuse_second_clipping,
    refuse_strategy,
)
from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip


def test_deepspeed_and_fsdp_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

    callback, trainer = GradientClipCallback(), pl.Trainer(accelerator="cpu", logger=False)
    for strategy, remedy in (
        (DeepSpeedStrategy, r"set Trainer\(gradient_clip_val"),
        (FSDPStrategy, "ModelParallelStrategy"),
    ):
        # Both need hardware or packages that are not here; what the callback asks of them is their class.
        monkeypatch.setattr(trainer, "_strategy", object.__new__(strategy), raising=False)
        monkeypatch.setattr(type(trainer), "strategy", property(lambda self: self._strategy))
        with pytest.raises(MisconfigurationException, match=f"{strategy.__name__}.*{remedy}"):
            callback.setup(trainer, BoringModel(), "fit")


def test_other_strategies_are_accepted() -> None:
    refuse_strategy(pl.Trainer(accelerator="cpu", logger=False))


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_the_trainers_clipping_is_named_with_its_algorithm(algorithm: Any) -> None:
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm
    )
    with pytest.raises(
        MisconfigurationException,
        match=rf"Trainer\(gradient_clip_val=0.5, gradient_clip_algorithm='{algorithm}'\). Remove",
    ):
        refuse_second_clipping(trainer)


def lbfgs() -> torch.optim.Optimizer:
    return torch.optim.LBFGS([nn.Parameter(torch.zeros(2))])


@pytest.mark.parametrize("rule", [Norm(1.0, warmup_steps=3), AutoClip(), ZClip(), AdaGC()])
def test_lbfgs_takes_no_rule_with_memory(rule: Any) -> None:
    with pytest.raises(MisconfigurationException, match=r"Use a rule without memory .* or another"):
        check_optimizer(lbfgs(), rule)


@pytest.mark.parametrize("rule", [Value(1.0), Norm(1.0), AGC(), Indicator()])
def test_lbfgs_takes_other_rules_with_a_warning(rule: Any) -> None:
    with pytest.warns(UserWarning, match="LBFGS evaluates the gradients several times a step"):
        check_optimizer(lbfgs(), rule)


def test_globs_must_match_a_parameter() -> None:
    names = {i: [f"layer{i}.weight"] for i in range(7)}
    check_globs("include", ["layer3.*", "*.weight"], names)
    check_globs("include", None, names)
    with pytest.raises(
        MisconfigurationException,
        match=r"exclude=\['\*\.bias'\]: '\*\.bias' matches no parameter.*'layer4.weight' and 2 more",
    ):
        check_globs("exclude", ["*.bias"], names)


@pytest.mark.parametrize(("indices", "bad"), [([2], 2), ([0, -1], -1)])
def test_indices_must_be_those_of_optimizers(indices: list[int], bad: int) -> None:
    check_indices([0, 1], 2)
    with pytest.raises(
        MisconfigurationException,
        match=rf"names {bad}, but .* 2 optimizers: use indices from 0 to 1",
    ):
        check_indices(indices, 2)


def test_what_is_in_order_comes_back_as_it_is() -> None:
    assert as_count("steps", 3, 0, "") == 3
    assert as_limit("norm", 3) == 3.0
    assert as_globs("include", ("a", "b")) == ["a", "b"]
    assert as_indices((0, 1)) == [0, 1]
    assert [f(None) for f in (as_indices,)] == [None]
    assert as_count("steps", None, 0, "") is as_limit("norm", None) is as_globs("include", None)


@pytest.mark.parametrize("value", [True, 1.5, "3", -1])
def test_counts_are_whole_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match=r"steps must be a whole number >= 0, got .*: give 3"):
        as_count("steps", value, 0, "give 3")


@pytest.mark.parametrize("value", [True, 0, -1.0, float("nan"), "1"])
def test_limits_are_positive_numbers(value: Any) -> None:
    with pytest.raises(ValueError, match="norm must be a number > 0, or None for no limit, got"):
        as_limit("norm", value)


@pytest.mark.parametrize("value", ["conv*", [1], {"a": 1}])
def test_globs_are_a_list_of_strings(value: Any) -> None:
    with pytest.raises(TypeError, match="include must be a list of globs over parameter names"):
        as_globs("include", value)


@pytest.mark.parametrize("value", [0, [True], ["0"], [1.0]])
def test_indices_are_a_list_of_whole_numbers(value: Any) -> None:
    with pytest.raises(TypeError, match="optimizers must be a list of optimizer indices"):
        as_indices(value)
