"""Several fits, callbacks, kinds of Trainer and checkpoint: each result is the right one, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd, load_quantized

other = pytest.importorskip("pytorch_lightning")


def make(package: Any = pl) -> Any:
    """Return a class of modules of a package."""

    class Net(package.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(
                nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3)
            )

        def forward(self, x: Any) -> Any:
            return self.net(x)

        def training_step(self, batch: Any, _: int) -> Any:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, _: int) -> None:
            self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    return Net


Net = make()


def rows(*more: Any) -> Any:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1), *more), 16)


def trainer_of(tmp_path: Any, *callbacks: Any, package: Any = pl, **given: Any) -> Any:
    return package.Trainer(
        max_epochs=1, accelerator="cpu", callbacks=list(callbacks), default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False,
        **{"logger": False, "enable_checkpointing": False, **given},
    )  # fmt: skip


def test_each_of_several_starts_from_the_float_weights_in_a_folder_of_its_own(
    tmp_path: Any,
) -> None:
    floats: dict[str, Any] = {}

    class Keep(pl.Callback):
        def on_train_end(self, trainer: Any, module: Any) -> None:
            floats.update({k: v.clone() for k, v in module.state_dict().items()})

    coarse, fine = QuantizeOnFitEnd(2, method="rtn"), QuantizeOnFitEnd(8, method="rtn")
    net = Net()
    trainer_of(tmp_path, Keep(), coarse, fine).fit(net, rows(), rows())
    assert coarse.artifact_path.parent.name == "quantized"
    assert fine.artifact_path.parent.name == "quantized-2"
    off = [
        float(
            (load_quantized(c.artifact_path)["net.0.weight"] - floats["net.0.weight"]).abs().max()
        )
        for c in (coarse, fine)
    ]
    assert off[1] < off[0] / 40
    assert coarse.report.float_metrics == fine.report.float_metrics
    stored = load_quantized(fine.artifact_path)
    assert all(torch.equal(v, stored[k]) for k, v in net.state_dict().items())


def test_one_folder_for_two_and_one_callback_twice_are_refused_before_training(
    tmp_path: Any,
) -> None:
    pair = [QuantizeOnFitEnd(bits, dirpath=tmp_path) for bits in (8, 4)]
    trainer = trainer_of(tmp_path, *pair)
    with pytest.raises(ValueError, match="needs a folder of its own"):
        trainer.fit(Net(), rows(), rows())
    once = QuantizeOnFitEnd(8)
    trainer = trainer_of(tmp_path, once, once)
    with pytest.raises(ValueError, match=r"must be listed once.*2 times"):
        trainer.fit(Net(), rows(), rows())
    assert trainer.global_step == 0


def test_a_second_fit_has_a_report_of_its_own_and_a_failed_one_shows_none(tmp_path: Any) -> None:
    callback, net = QuantizeOnFitEnd(8, dirpath=tmp_path), Net()
    trainer_of(tmp_path, callback).fit(net, rows(), rows())
    first = callback.report
    trainer_of(tmp_path, callback).fit(net, rows(), rows())
    assert callback.report.float_metrics != first.float_metrics

    class Fails(Net):
        def on_train_epoch_end(self) -> None:
            raise KeyError("stopped")

    with pytest.raises(KeyError):
        trainer_of(tmp_path, callback).fit(Fails(), rows(), rows())
    assert callback.report is None
    assert callback.artifact_path is None


class Renamed(Net):
    """Its checkpoints have other keys, lack some, and hold a class among the hyper-parameters."""

    def __init__(self, act: type = nn.ReLU, root: Path = Path()) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.strict_loading = False

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        kept = {k: v for k, v in checkpoint["state_dict"].items() if "frozen" not in k}
        checkpoint["state_dict"] = {f"own.{k}": v for k, v in kept.items()}

    def on_load_checkpoint(self, checkpoint: Any) -> None:
        checkpoint["state_dict"] = {
            k.removeprefix("own."): v for k, v in checkpoint["state_dict"].items()
        }


def test_the_best_checkpoint_is_loaded_as_lightning_loads_it(tmp_path: Any) -> None:
    best = ModelCheckpoint(tmp_path / "best", monitor="val_loss")
    last = ModelCheckpoint(tmp_path / "last", save_last=True, save_top_k=0)
    callback, net = QuantizeOnFitEnd(8, weights="best", dirpath=tmp_path), Renamed()
    trainer_of(tmp_path, last, best, callback, enable_checkpointing=True, max_steps=-1).fit(
        net, rows(), rows()
    )
    assert callback.report.failures == ()
    score = float(best.best_model_score)
    assert callback.report.float_metrics["val_loss"] == pytest.approx(score, rel=1e-6)


def test_no_best_checkpoint_is_refused_before_training(tmp_path: Any) -> None:
    trainer = trainer_of(
        tmp_path, ModelCheckpoint(tmp_path, save_top_k=0, save_last=True),
        QuantizeOnFitEnd(8, weights="best"), enable_checkpointing=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match="save_top_k=0"):
        trainer.fit(Net(), rows(), rows())
    assert trainer.global_step == 0


@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true", "bf16-mixed"])
@pytest.mark.parametrize("asked", [{"bits": 4}, {"bits": "auto", "max_drop": 5.0}])
def test_every_precision_calibrates_and_judges(precision: Any, asked: Any, tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd(dirpath=tmp_path, **asked)
    trainer_of(tmp_path, callback, precision=precision).fit(Net(), rows(), rows())
    assert callback.report.failures == ()
    assert {layer.method for layer in callback.report.layers} == {"gptq"}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("bits", [8, 4])
def test_a_trainer_of_the_other_package_serves_too(bits: int, tmp_path: Any) -> None:
    callback, net = QuantizeOnFitEnd(bits, dirpath=tmp_path), make(other)()
    trainer_of(tmp_path, callback, package=other).fit(net, rows(), rows())
    assert callback.report.failures == ()
    found = trainer_of(tmp_path, package=other).validate(net, rows(), verbose=False)[0]
    assert callback.report.quantized_metrics == pytest.approx(found, abs=0)


class Named(pl.LightningDataModule):
    """Batches get their names on the way to the device."""

    def train_dataloader(self) -> Any:
        return CombinedLoader({"l": rows(), "m": rows()}, "max_size_cycle")

    def val_dataloader(self) -> Any:
        return CombinedLoader({"l": rows(), "m": rows()}, "max_size")

    def on_after_batch_transfer(self, batch: Any, _: int) -> Any:
        return {"named": batch["l"]}


class Takes(Net):
    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch["named"], index)

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch["named"], index)


@pytest.mark.parametrize("asked", [{"bits": 4}, {"bits": "auto", "max_drop": 5.0}])
def test_batches_take_the_trainers_road(asked: Any, tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd(dirpath=tmp_path, **asked)
    trainer_of(tmp_path, callback).fit(Takes(), datamodule=Named())
    assert callback.report.failures == ()
    assert "4 batches of the train dataloader" in callback.report.calibration


class Pairs(Net):
    """Train batches carry a weight, validation batches do not."""

    def validation_step(self, batch: Any, index: int) -> None:
        x, y = batch
        super().validation_step((x, y), index)


def test_train_batches_of_another_form_give_way_to_those_of_validation(tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd(4, dirpath=tmp_path)
    trainer_of(tmp_path, callback).fit(Pairs(), rows(torch.ones(64)), rows())
    assert callback.report.failures == ()
    assert "4 batches of the validation dataloader (not of others" in callback.report.calibration


class Steps(Net):
    """Steps its scheduler by hand when a validation ends, and logs the rate of its optimizer."""

    automatic_optimization = False

    def training_step(self, batch: Any, index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, index))
        optimizer.step()

    def validation_step(self, batch: Any, index: int) -> None:
        super().validation_step(batch, index)
        self.log("rate", self.optimizers().param_groups[0]["lr"])

    def on_validation_epoch_end(self) -> None:
        self.lr_schedulers().step()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.1)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)]


def test_schedulers_and_optimizers_are_at_hand_and_stay_as_they_were(tmp_path: Any) -> None:
    callback = QuantizeOnFitEnd(4, dirpath=tmp_path)
    trainer = trainer_of(tmp_path, callback, num_sanity_val_steps=0)
    trainer.fit(Steps(), rows(), rows())
    assert callback.report.failures == ()
    assert callback.report.float_metrics["rate"] == pytest.approx(0.05)
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05)
    assert trainer.lr_scheduler_configs[0].scheduler.last_epoch == 1


def test_pruned_weights_keep_their_zeros(tmp_path: Any) -> None:
    callback, net = QuantizeOnFitEnd(4, dirpath=tmp_path), Net()
    trainer_of(tmp_path, ModelPruning("l1_unstructured", amount=0.5), callback).fit(
        net, rows(), rows()
    )
    stored = load_quantized(callback.artifact_path)
    assert float((stored["net.0.weight"] == 0).float().mean()) > 0.3
    assert any(
        "kept by a grid with an exact zero" in layer.note for layer in callback.report.layers
    )
