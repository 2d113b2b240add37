"""Whatever raises after training, the fit is kept: a file, or the float weights untouched, and the reason told."""

from __future__ import annotations

import errno
import os
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd, load_quantized
from clipquant.callbacks import fit_end
from clipquant.callbacks.failures import QuantizationError

HOOKS = (
    "forward",
    "validation_step",
    "training_step",
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_validation_model_eval",
    "on_validation_model_train",
    "on_before_batch_transfer",
    "transfer_batch_to_device",
    "on_after_batch_transfer",
    "train_dataloader",
    "val_dataloader",
    "lr_schedulers",
    "__deepcopy__",
)
SETTINGS: dict[str, dict[str, Any]] = {
    "4": {"bits": 4},
    "auto": {"bits": "auto", "max_drop": 5.0, "max_size": 8000},
}


class InjectedError(Exception):
    """What is raised, once the training is over."""


class Net(pl.LightningModule):
    """Every hook is its own, and raises once it is armed."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU())
        self.head = nn.Linear(16, 3)
        self.armed: str | None = None
        self.countdown = 0

    def hit(self, name: str) -> None:
        if self.armed == name:
            self.countdown -= 1
            if self.countdown < 0:
                raise InjectedError(name)

    def forward(self, x: Any) -> Any:
        self.hit("forward")
        return self.head(self.body(x))

    def training_step(self, batch: Any, index: int) -> Any:
        self.hit("training_step")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, index: int) -> None:
        self.hit("validation_step")
        self.lr_schedulers()
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def __deepcopy__(self, memo: Any) -> Any:
        self.hit("__deepcopy__")
        copied = type(self)()
        memo[id(self)] = copied
        copied.load_state_dict(self.state_dict())
        copied.armed, copied.countdown = self.armed, self.countdown
        return copied

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]

    def train_dataloader(self) -> Any:
        self.hit("train_dataloader")
        return rows()

    def val_dataloader(self) -> Any:
        self.hit("val_dataloader")
        return rows()

    def on_train_end(self) -> None:
        self.trained = {k: v.clone() for k, v in self.state_dict().items()}
        self.armed, self.countdown = self.fault


def _hook(name: str) -> Any:
    def hook(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.hit(name)
        return getattr(pl.LightningModule, name)(self, *args, **kwargs)

    return hook


for _name in HOOKS:
    if _name not in vars(Net) and hasattr(pl.LightningModule, _name):
        setattr(Net, _name, _hook(_name))


def rows() -> Any:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(48, 8, generator=generator)
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16)


def fit(net: Net, callback: QuantizeOnFitEnd, tmp_path: Any, **given: Any) -> pl.Trainer:
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=[callback], default_root_dir=tmp_path,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "num_sanity_val_steps": 0, **given},
    )  # fmt: skip
    trainer.fit(net)
    return trainer


def check(net: Net, callback: QuantizeOnFitEnd) -> None:
    """A file that the module equals, or float weights as they were trained; never neither."""
    state = net.state_dict()
    if callback.artifact_path is not None:
        stored = load_quantized(callback.artifact_path)
        assert all(torch.equal(value, stored[name]) for name, value in state.items())
    else:
        assert all(torch.equal(value, net.trained[name]) for name, value in state.items())


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("countdown", [0, 3])
@pytest.mark.parametrize("name", HOOKS)
def test_a_hook_that_raises_after_training_loses_nothing(
    name: str, countdown: int, setting: str, tmp_path: Any
) -> None:
    net, callback = Net(), QuantizeOnFitEnd(dirpath=tmp_path, **SETTINGS[setting])
    net.fault = (name, countdown)
    fit(net, callback, tmp_path)
    assert callback.artifact_path is not None  # data-free rounding needs no hook at all
    check(net, callback)
    assert all("Injected" in said for said in callback.report.failures)


@pytest.mark.parametrize("step", ["judge_parts", "find_batches", "export_files",
                                  "write_report", "log_report", "print_summary"])  # fmt: skip
def test_a_step_of_ours_that_raises_is_told_and_the_rest_goes_on(
    step: str, tmp_path: Any, monkeypatch: Any
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise InjectedError(step)

    monkeypatch.setattr(fit_end, step, broken)
    net, callback = Net(), QuantizeOnFitEnd(4, dirpath=tmp_path, export=["pt2"])
    net.fault = (None, 0)
    with pytest.warns(UserWarning, match=rf"failed \(InjectedError: {step}\)"):
        fit(net, callback, tmp_path)
    check(net, callback)
    assert callback.artifact_path is not None


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("call", ["fsync", "replace", "write_text", "mkdir"])
def test_a_disk_that_is_full_leaves_a_file_or_the_float_weights(
    call: str, tmp_path: Any, monkeypatch: Any
) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    class Filling(Net):
        def on_train_end(self) -> None:
            super().on_train_end()
            place = os if call in ("fsync", "replace") else type(tmp_path)
            monkeypatch.setattr(place, call, full)

    net, callback = Filling(), QuantizeOnFitEnd(8, dirpath=tmp_path / "out")
    net.fault = (None, 0)
    fit(net, callback, tmp_path)
    monkeypatch.undo()
    check(net, callback)
    if callback.artifact_path is None:
        assert "clipquant.quantize(module, bits=8).save(" in callback.report.failures[-1]


class Broken(CSVLogger):
    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        if any(name.startswith("quantized/") for name in metrics):
            raise InjectedError("logger")
        super().log_metrics(metrics, step)


def test_a_logger_that_raises_is_named_and_nothing_else_is_lost(tmp_path: Any) -> None:
    net, callback = Net(), QuantizeOnFitEnd(8, dirpath=tmp_path)
    net.fault = (None, 0)
    with pytest.warns(UserWarning, match=r"Broken did not take .*InjectedError: logger"):
        fit(net, callback, tmp_path, logger=Broken(tmp_path))
    check(net, callback)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_on_fail_raise_raises_and_the_file_is_there(tmp_path: Any) -> None:
    net, callback = Net(), QuantizeOnFitEnd(4, dirpath=tmp_path, on_fail="raise")
    net.fault = ("validation_step", 0)
    with pytest.raises(QuantizationError, match=r"Injected.*What could be done is in .*model\.saf"):
        fit(net, callback, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    check(net, callback)
