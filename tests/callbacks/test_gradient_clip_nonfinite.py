"""What GradientClipCallback does with NaN, infinite and far too large gradients."""

from __future__ import annotations

import copy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch import Tensor

from clipquant import GradientClipCallback
from clipquant.clip import Norm

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"momentum": 0.9, "weight_decay": 0.1, "fused": True}),
    ("Adam", {"weight_decay": 0.1}),
    ("Adam", {"fused": True}),
    ("AdamW", {"foreach": False}),
    ("AdamW", {"foreach": True}),
    ("AdamW", {"fused": True}),
    ("RMSprop", {"momentum": 0.9, "weight_decay": 0.1}),
    ("Adagrad", {"weight_decay": 0.1}),
    ("Adagrad", {"fused": True}),
]


class Model(BoringModel):
    """Linear(32, 2) whose gradients are multiplied by `factors[step]` in backward."""

    def __init__(
        self, factors: list[float], optimizer: str = "SGD", settings: dict[str, Any] | None = None
    ) -> None:
        super().__init__()
        self.factors, self.optimizer_name, self.settings = factors, optimizer, settings or {}
        self.states: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return super().training_step(batch, batch_idx)["loss"] * self.factors[batch_idx]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer_name)(self.parameters(), lr=0.1, **self.settings)

    def on_train_batch_end(self, *args: object) -> None:
        self.states.append(
            (
                copy.deepcopy(self.state_dict()),
                copy.deepcopy(self.optimizers().state_dict()["state"]),
            )
        )


def fit(model: pl.LightningModule, callback: pl.Callback, **settings: Any) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_epochs=1,
        callbacks=[callback],
        **settings,
    )
    trainer.fit(model, torch.utils.data.DataLoader(RandomDataset(32, len(model.factors))))
    return trainer


def flat(states: tuple[dict[str, Any], dict[Any, Any]]) -> list[Tensor]:
    weights, moments = states
    return [
        *weights.values(),
        *(v for entry in moments.values() for v in entry.values() if torch.is_tensor(v)),
    ]


@pytest.mark.parametrize("rule", [1.0, Norm(1.0)], ids=["value", "norm"])
@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_skip_leaves_parameters_and_optimizer_state_bit_identical(
    rule: Any, optimizer: str, settings: dict[str, Any], bad: float
) -> None:
    model = Model([1.0, bad, 1.0], optimizer, settings)
    fit(model, GradientClipCallback(rule))
    first, second, third = (flat(state) for state in model.states)
    assert len(first) == len(second) > 0
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(second[0], third[0])


def test_skipping_the_very_first_step_is_as_if_it_had_never_been() -> None:
    settings = {"momentum": 0.9, "fused": True}
    skipped, plain = Model([float("nan"), 1.0], "SGD", settings), Model([1.0], "SGD", settings)
    plain.load_state_dict(skipped.state_dict())
    fit(skipped, GradientClipCallback(1.0))
    assert not skipped.states[0][1]
    assert all(torch.isfinite(v).all() for v in flat(skipped.states[1]))


def test_zero_replaces_only_the_non_finite_elements() -> None:
    class Bad(Model):
        def on_after_backward(self) -> None:
            self.layer.weight.grad[0, 0] = float("nan")
            self.layer.weight.grad[1, 3] = -float("inf")
            self.before = self.layer.weight.grad.clone()

    model = Bad([1.0])
    callback = GradientClipCallback(1e3, on_nonfinite="zero")
    fit(model, callback)
    expected = model.before.clone()
    expected[0, 0] = expected[1, 3] = 0.0
    assert torch.equal(model.layer.weight.grad, expected)
    assert callback.record.nonfinite == ("layer.weight",)
    assert not callback.record.skipped


def test_raise_names_the_parameters() -> None:
    with pytest.raises(
        FloatingPointError, match=r"NaN or infinite gradients in layer\.weight, layer\.bias"
    ):
        fit(Model([float("nan")]), GradientClipCallback(on_nonfinite="raise"))


def test_propagate_lets_the_optimizer_have_them() -> None:
    model = Model([float("nan")])
    fit(model, GradientClipCallback(on_nonfinite="propagate"))
    assert torch.isnan(model.layer.weight).all()


def test_too_many_skips_in_a_row_raise_with_the_history() -> None:
    nan = float("nan")
    with pytest.raises(RuntimeError) as error:
        fit(
            Model([1.0, nan, nan, 1.0, nan, nan, nan]),
            GradientClipCallback(max_consecutive_skips=2),
        )
    text = str(error.value)
    assert "3 steps in a row were skipped, max_consecutive_skips=2 allows 2" in text
    assert text.count("gradient norm nan, NaN or infinite in layer.weight, layer.bias") == 3


def test_skip_above_skips_spikes_only() -> None:
    model = Model([1.0, 1e4, 1.0])
    callback = GradientClipCallback(1e9, skip_above=100.0)
    fit(model, callback)
    first, second, third = (flat(state) for state in model.states)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(second[0], third[0])


def test_finite_gradients_whose_squares_overflow_are_clipped_not_skipped() -> None:
    model = Model([1e30])
    callback = GradientClipCallback(Norm(1.0))
    fit(model, callback)
    assert not callback.record.skipped
    assert float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()) == pytest.approx(
        1.0, rel=1e-5
    )
