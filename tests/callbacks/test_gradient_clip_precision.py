"""Mixed precision and fused optimizers: clipping is that of float32 training, whoever unscales."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor

from clipquant import GradientClipCallback
from clipquant.clip import AGC, AdaGC, AutoClip, Indicator, Norm, Value, ZClip

OPTIMIZERS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "fused": True}),
    ("AdamW", {}),
    ("AdamW", {"fused": True}),
    ("Adam", {"fused": True}),
    ("Adagrad", {"fused": True}),
]
RULES: list[Any] = [
    Value(0.01),
    Norm(0.05),
    Norm(0.05, "inf"),
    Norm(0.02, scope="tensor"),
    AGC(0.01),
    AutoClip(10),
    ZClip(warmup=2, z=0.5),
    AdaGC(warmup=1, ratio=0.5),
    Indicator(0.01),
]


class Model(BoringModel):
    def __init__(
        self, optimizer: str, settings: dict[str, Any], bad_step: int | None = None
    ) -> None:
        super().__init__()
        self.optimizer_name, self.settings, self.bad_step = optimizer, settings, bad_step
        self.history: list[Tensor] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        # A loss in float32, so that scaled and unscaled gradients differ by a power of two exactly.
        with torch.autocast("cpu", enabled=False):
            loss = (self.layer(batch) ** 2).mean()
        return loss * float("inf") if batch_idx == self.bad_step else loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.optimizer_name)(
            self.parameters(), lr=0.05, **self.settings
        )

    def on_train_batch_end(self, *args: object) -> None:
        self.history.append(self.layer.weight.detach().clone())


def fit(model: Model, callback: pl.Callback, steps: int = 5, **settings: Any) -> pl.Trainer:
    torch.manual_seed(0)
    data = RandomDataset(32, steps)
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
    trainer.fit(model, torch.utils.data.DataLoader(data))
    return trainer


def amp(init_scale: float = 1024.0) -> MixedPrecision:
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=init_scale))


def pair(
    optimizer: str, settings: dict[str, Any], bad_step: int | None = None
) -> tuple[Model, Model]:
    first, second = Model(optimizer, settings, bad_step), Model(optimizer, settings, bad_step)
    second.load_state_dict(first.state_dict())
    return first, second


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
def test_under_a_grad_scaler_every_rule_does_what_it_does_in_float32(
    rule: Any, optimizer: str, settings: dict[str, Any]
) -> None:
    scaled, plain = pair(optimizer, settings)
    ours, reference = GradientClipCallback(rule), GradientClipCallback(rule)
    fit(scaled, ours, plugins=[amp()])
    fit(plain, reference)
    torch.testing.assert_close(scaled.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)
    assert ours.record.grad_norm == pytest.approx(reference.record.grad_norm, rel=1e-5)
    assert ours.record.grad_norm_clipped == pytest.approx(
        reference.record.grad_norm_clipped, rel=1e-5
    )


@pytest.mark.parametrize("rule", [Value(0.01), Norm(0.05), AutoClip(50)], ids=repr)
@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
def test_an_overflow_stays_the_scalers_business(
    rule: Any, optimizer: str, settings: dict[str, Any]
) -> None:
    model = Model(optimizer, settings, bad_step=2)
    callback = GradientClipCallback(rule, max_consecutive_skips=0, on_nonfinite="raise")
    trainer = fit(model, callback, plugins=[amp()])
    assert torch.equal(model.history[1], model.history[2])
    assert not torch.equal(model.history[2], model.history[3])
    assert trainer.precision_plugin.scaler.get_scale() == 512.0
    assert torch.isfinite(model.history[-1]).all()


@pytest.mark.parametrize(("optimizer", "settings"), OPTIMIZERS)
def test_a_spike_is_skipped_under_a_scaler_too(optimizer: str, settings: dict[str, Any]) -> None:
    model = Model(optimizer, settings)
    callback = GradientClipCallback(Norm(1.0), skip_above=1e-9, max_consecutive_skips=None)
    before = model.layer.weight.detach().clone()
    fit(model, callback, plugins=[amp()])
    assert torch.equal(before, model.layer.weight)
    assert callback.record.skipped


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_bf16_mixed_clips_float32_gradients(settings: dict[str, Any]) -> None:
    scaled, plain = pair("AdamW", settings)
    fit(scaled, GradientClipCallback(Norm(0.05)), precision="bf16-mixed")
    fit(plain, GradientClipCallback(Norm(0.05)))
    torch.testing.assert_close(scaled.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_true_half_precision(precision: Any, settings: dict[str, Any]) -> None:
    model = Model("SGD", settings)
    callback = GradientClipCallback(Norm(0.05))
    fit(model, callback, precision=precision)
    total = torch.stack([p.grad.float().norm() for p in model.parameters()]).norm()
    assert callback.record.grad_norm > 0.05
    assert float(total) == pytest.approx(0.05, rel=0.01)


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("rule", [Norm(0.05), AutoClip(10), ZClip(max_norm=0.05)], ids=repr)
def test_a_fused_step_clips_by_itself_and_nothing_is_left_behind(
    optimizer: str, scaler: bool, rule: Any
) -> None:
    seen: list[Any] = []

    class Watching(Model):
        def optimizer_step(
            self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
        ) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            seen.append(getattr(optimizer.optimizer, "grad_scale", None))

    fused, plain = Watching(optimizer, {"fused": True}), Model(optimizer, {})
    plain.load_state_dict(fused.state_dict())
    callback = GradientClipCallback(rule)
    fit(fused, callback, **({"plugins": [amp()]} if scaler else {}))
    fit(plain, GradientClipCallback(rule))
    assert callback.record.deferred is not None, "clipping was folded into the step"
    assert seen == [None] * 5
    torch.testing.assert_close(fused.layer.weight, plain.layer.weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        fused.layer.weight.grad, plain.layer.weight.grad, rtol=1e-5, atol=1e-7
    )


def test_what_a_failed_step_left_behind_does_not_scale_the_next_one() -> None:
    class Failed(Model):
        def on_train_batch_start(self, *args: object) -> None:
            self.optimizers().optimizer.grad_scale = torch.tensor(1e4)

    failed, clean = Failed("SGD", {"fused": True}), Model("SGD", {"fused": True})
    clean.load_state_dict(failed.state_dict())
    fit(failed, GradientClipCallback(Norm(1e4)))
    fit(clean, GradientClipCallback(Norm(1e4)))
    assert torch.equal(failed.layer.weight, clean.layer.weight)


@pytest.mark.parametrize("reader", ["module", "callback", "configure"])
def test_whoever_reads_gradients_after_the_callback_reads_clipped_ones(reader: str) -> None:
    norms: list[float] = []

    def read(module: pl.LightningModule) -> None:
        norms.append(float(torch.stack([p.grad.norm() for p in module.parameters()]).norm()))

    class Reader(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            read(pl_module)

    class ReadingModel(Model):
        if reader == "module":

            def on_before_optimizer_step(self, optimizer: Any) -> None:
                read(self)

        if reader == "configure":

            def configure_gradient_clipping(self, optimizer: Any, **settings: Any) -> None:
                read(self)

    callbacks = [GradientClipCallback(Norm(0.05)), *([Reader()] if reader == "callback" else [])]
    trainer = pl.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0, max_steps=3, callbacks=callbacks,
    )  # fmt: skip
    trainer.fit(
        ReadingModel("AdamW", {"fused": True}), torch.utils.data.DataLoader(RandomDataset(32, 3))
    )
    assert norms == pytest.approx([0.05] * 3, rel=1e-4)
