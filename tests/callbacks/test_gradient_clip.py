"""GradientClipCallback in a Trainer: what it clips, when, and what it refuses."""

from __future__ import annotations

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from clipquant import GradientClipCallback
from clipquant.clip import Norm


class Model(BoringModel):
    """Linear(32, 2) whose loss is scaled so that gradients are as large as asked for."""

    def __init__(self, factor: float = 100.0, optimizer: str = "SGD", **settings: object) -> None:
        super().__init__()
        self.factor, self.optimizer_name, self.settings = factor, optimizer, {"lr": 0.1, **settings}

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.factor * super().training_step(batch, batch_idx)["loss"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), **self.settings)


class Recorder(pl.Callback):
    """Keeps the gradients that reach the optimizer."""

    def __init__(self) -> None:
        self.grads: list[list[Tensor]] = []

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: object
    ) -> None:
        self.grads.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])


def fit(
    model: pl.LightningModule, callback: pl.Callback | None, steps: int = 4, **settings: object
) -> Recorder:
    recorder = Recorder()
    arguments = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "max_steps": steps,
        "callbacks": [c for c in (callback, recorder) if c is not None],
        **settings,
    }
    pl.Trainer(**arguments).fit(model, torch.utils.data.DataLoader(RandomDataset(32, 64)))
    return recorder


@pytest.fixture(autouse=True)
def _quiet(recwarn: pytest.WarningsRecorder) -> None:
    torch.manual_seed(0)


def test_default_clamps_every_element_to_one() -> None:
    grads = fit(Model(), GradientClipCallback()).grads[-1]
    assert max(float(g.abs().max()) for g in grads) == 1.0


def test_value_equals_the_trainers_own_value_clipping_bit_for_bit() -> None:
    ours, theirs = Model(), Model()
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    fit(ours, GradientClipCallback(0.5))
    torch.manual_seed(1)
    fit(theirs, None, gradient_clip_val=0.5, gradient_clip_algorithm="value")
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("fused", [False, True])
def test_norm_equals_the_trainers_own_norm_clipping(optimizer: str, fused: bool) -> None:
    ours, theirs = Model(optimizer=optimizer, fused=fused), Model(optimizer=optimizer)
    theirs.load_state_dict(ours.state_dict())
    torch.manual_seed(1)
    fit(ours, GradientClipCallback(Norm(0.5)))
    torch.manual_seed(1)
    fit(theirs, None, gradient_clip_val=0.5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_include_and_exclude_leave_other_parameters_alone() -> None:
    free, only, but = Model(), Model(), Model()
    for model in (only, but):
        model.load_state_dict(free.state_dict())
    torch.manual_seed(1)
    unclipped = fit(free, None, steps=1).grads[-1]
    torch.manual_seed(1)
    included = fit(only, GradientClipCallback(0.01, include=["*.bias"]), steps=1).grads[-1]
    torch.manual_seed(1)
    excluded = fit(but, GradientClipCallback(0.01, exclude=["layer.w*"]), steps=1).grads[-1]
    for grads in (included, excluded):
        assert torch.equal(grads[0], unclipped[0])
        assert float(grads[1].abs().max()) <= 0.01 < float(unclipped[1].abs().max())


def test_clips_from_start_step_until_before_stop_step() -> None:
    recorder = fit(Model(), GradientClipCallback(0.01, start_step=1, stop_step=3), steps=4)
    largest = [max(float(g.abs().max()) for g in grads) for grads in recorder.grads]
    assert [value <= 0.01 for value in largest] == [False, True, True, False]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": -1.0}, "limit must be a number >= 0, got -1.0"),
        ({"rule": float("nan")}, "limit must be a number >= 0, got nan"),
        (
            {"on_nonfinite": "ignore"},
            "on_nonfinite must be one of 'skip', 'zero', 'raise', 'propagate', got 'ignore'",
        ),
        (
            {"max_consecutive_skips": -1},
            "max_consecutive_skips must be a whole number >= 0, got -1",
        ),
        ({"skip_above": 0.0}, "skip_above must be a number > 0, or None for no limit, got 0.0"),
        ({"start_step": -1}, "start_step must be a whole number >= 0, got -1"),
        ({"start_step": 5, "stop_step": 5}, "stop_step must be greater than start_step=5, got 5"),
        ({"log": "all"}, 'log must be true, false, "groups" or "params", got \'all\''),
    ],
)
def test_bad_values_are_refused_with_rule_value_and_remedy(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        GradientClipCallback(**settings)  # type: ignore[arg-type]
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"rule": "norm"},
            "a rule must be a number or an object with the methods init, plan and clip, got 'norm'",
        ),
        ({"rule": Norm}, "got the class Norm, not an instance of it"),
        ({"include": "conv*"}, "include must be a list of globs over parameter names, got 'conv*'"),
        ({"optimizers": 0}, "optimizers must be a list of optimizer indices, got 0"),
    ],
)
def test_bad_types_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError) as error:
        GradientClipCallback(**settings)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_an_unknown_glob_is_refused_and_names_real_parameters() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"'head\.\*' matches no parameter.*'layer\.weight'"
    ):
        fit(Model(), GradientClipCallback(include=["layer.*", "head.*"]))


def test_an_unknown_optimizer_is_refused() -> None:
    with pytest.raises(
        MisconfigurationException, match=r"names 1, but configure_optimizers returned 1 optimizer"
    ):
        fit(Model(), GradientClipCallback(optimizers=[1]))


def test_the_trainers_clipping_is_refused_naming_both_settings_and_remedies() -> None:
    with pytest.raises(MisconfigurationException) as error:
        fit(Model(), GradientClipCallback(), gradient_clip_val=0.5)
    text = str(error.value)
    assert "Trainer(gradient_clip_val=0.5" in text
    assert "Remove gradient_clip_val from the Trainer, or remove GradientClipCallback" in text


def test_gradient_clip_val_zero_means_no_clipping_and_is_accepted() -> None:
    fit(Model(), GradientClipCallback(), steps=1, gradient_clip_val=0)
