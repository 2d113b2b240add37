"""Latency before and after: measured in turn on train batches, labelled, without a trace."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant.callbacks.road import latency
from clipquant.callbacks.road.calibration import CalibrationError, find_batches, probe
from clipquant.callbacks.road.road import open_road


def measure_latency(trainer: pl.Trainer, module: pl.LightningModule, state: Any) -> Any:
    with open_road(trainer, module, probe) as road:
        return latency.measure_latency(road, state, find_batches(road, 1))


class Slow(pl.LightningModule):
    """Counts its steps; those with weights of zero take no rest."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Any) -> Any:
        return self.layer(x)

    def training_step(self, batch: Any, index: int) -> Any:
        return self(batch[0]).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


class Stepped(Slow):
    """Has a validation step, that busies itself the longer the larger its weights are."""

    def validation_step(self, batch: Any, index: int) -> None:
        self.calls += 1
        busy = torch.randn(300, 300)
        for _ in range(int(self.layer.weight.abs().max() * 20)):
            busy = busy @ busy.T / 300
        self.log("loss", self(batch[0]).mean())


class Choosy(Slow):
    """Has a validation step that takes no train batch."""

    def validation_step(self, batch: Any, index: int) -> None:
        raise TypeError("two inputs wanted")


def fitted(module: pl.LightningModule) -> pl.Trainer:
    trainer = pl.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(torch.randn(12, 3)), 6))
    return trainer


def test_both_are_measured_on_a_train_batch_and_nothing_is_left(monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.05)
    module = Stepped()
    trainer = fitted(module)
    with torch.no_grad():
        module.layer.weight.fill_(1.0)
    zeros = {name: t * 0 for name, t in module.state_dict().items()}
    before = {name: t.clone() for name, t in module.state_dict().items()}
    random = torch.get_rng_state()
    found = measure_latency(trainer, module, zeros)
    assert found is not None
    assert found.float_ms > found.quantized_ms > 0
    assert (found.batch, found.what) == (6, "validation_step")
    assert found.threads == torch.get_num_threads()
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_without_a_validation_step_forward_is_timed(monkeypatch: Any) -> None:
    monkeypatch.setattr(latency, "SECONDS", 0.0)
    module = Slow()
    found = measure_latency(fitted(module), module, module.state_dict())
    assert found is not None
    assert found.what == "forward"


def test_a_step_that_takes_no_train_batch_gives_way_to_forward() -> None:
    module = Choosy()
    assert measure_latency(fitted(module), module, module.state_dict()).what == "forward"


class Hopeless(Choosy):
    """Nor has it a forward that does."""

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch[0]).square().mean()

    def forward(self, x: Any, y: Any) -> Any:
        raise KeyError("y")


def test_batches_that_nothing_takes_are_told() -> None:
    module = Hopeless()
    with pytest.raises(CalibrationError, match=r"two inputs wanted.*missing 1 required"):
        measure_latency(fitted(module), module, module.state_dict())
