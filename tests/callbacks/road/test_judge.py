"""A validation of the user's own, run aside: right figures, and no trace of it."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanSquaredError

from clipquant.callbacks.road.calibration import probe
from clipquant.callbacks.road.judge import judge as judge_on
from clipquant.callbacks.road.road import open_road


def judge(trainer: pl.Trainer, module: pl.LightningModule, state: Any = None) -> dict[str, float]:
    with open_road(trainer, module, probe) as road:
        return judge_on(road, state)


class Net(pl.LightningModule):
    """Logs a torchmetrics object, a plain figure with sync_dist and one at the end of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.norm = nn.BatchNorm1d(4)
        self.mse = MeanSquaredError()
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.norm(x)).squeeze(1)

    def training_step(self, batch: Any, index: int) -> Tensor:
        return (self(batch["x"]) - batch["y"]).square().mean()

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        out = self(batch["x"])
        self.mse(out, batch["y"])
        self.log("mse", self.mse)
        self.log("mae", (out - batch["y"]).abs().mean(), sync_dist=True)
        self.log("epoch", float(self.current_epoch))
        self.log("steps", float(self.trainer.global_step))
        self.seen += 1
        if self.logger is not None:
            self.logger.experiment.add_scalar("x", 1.0)

    def on_validation_epoch_end(self) -> None:
        self.log("training", float(self.training))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05)


class Quiet(CSVLogger):
    """A logger whose `experiment` takes no scalars: only a stand-in survives `add_scalar`."""


def rows(count: int = 48, seed: int = 0) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator)
    return TensorDataset(x, x.sum(1) + 0.1 * torch.randn(count, generator=generator))


def collate(pairs: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    return {"x": torch.stack([x for x, _ in pairs]), "y": torch.stack([y for _, y in pairs])}


def loader(**kwargs: Any) -> DataLoader[Any]:
    return DataLoader(rows(), batch_size=16, collate_fn=collate, **kwargs)


def fitted(
    tmp_path: Path,
    module: pl.LightningModule,
    *,
    val: Any = None,
    datamodule: Any = None,
    **kwargs: Any,
) -> pl.Trainer:
    settings: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "max_epochs": 2}
    trainer = pl.Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        devices=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings | kwargs,
    )
    if datamodule is not None:
        trainer.fit(module, datamodule=datamodule)
    else:
        trainer.fit(module, loader(), loader() if val is None else val)
    return trainer


def test_figures_are_those_of_the_trainers_own_validation(tmp_path: Path) -> None:
    module = Net()
    trainer = fitted(tmp_path, module)
    found = judge(trainer, module)
    again = pl.Trainer(logger=False, accelerator="cpu", enable_progress_bar=False)
    again.validate(module, loader(), verbose=False)
    assert found["mse"] == float(again.callback_metrics["mse"])
    assert found["mae"] == float(again.callback_metrics["mae"])


def test_the_module_finds_its_place_in_training(tmp_path: Path) -> None:
    module = Net()
    found = judge(fitted(tmp_path, module), module)
    assert (found["epoch"], found["steps"], found["training"]) == (2.0, 6.0, 0.0)


def test_several_dataloaders_and_other_weights(tmp_path: Path) -> None:
    module = Net()
    trainer = fitted(tmp_path, module, val=[loader(), loader()])
    zeros = {name: torch.zeros_like(t) for name, t in module.state_dict().items()}
    found = judge(trainer, module, zeros)
    _, y = rows().tensors
    for name in ("mse/dataloader_idx_0", "mse/dataloader_idx_1"):
        assert found[name] == pytest.approx(float(y.square().mean()), rel=1e-5)


def test_no_trace_is_left(tmp_path: Path) -> None:
    module = Net()
    checkpoint = ModelCheckpoint(tmp_path / "ckpt", monitor="mse")
    logger = CSVLogger(tmp_path, "logs")
    trainer = fitted(
        tmp_path, Plain(module), logger=logger, callbacks=[checkpoint], enable_checkpointing=True
    )
    outer = trainer.lightning_module
    before = _trace(trainer, outer, tmp_path)
    saved, rng = checkpoint.state_dict(), torch.get_rng_state()
    judge(trainer, outer)
    after = _trace(trainer, outer, tmp_path)
    assert before == after
    assert checkpoint.state_dict() == saved
    assert torch.equal(rng, torch.get_rng_state())


class Plain(Net):
    """A Net that takes the weights of another and logs to no experiment."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.load_state_dict(net.state_dict())

    def validation_step(self, batch: Any, index: int, dataloader_idx: int = 0) -> None:
        self.log("mse", (self(batch["x"]) - batch["y"]).square().mean())
        self.seen += 1


def _trace(trainer: pl.Trainer, module: Any, folder: Path) -> Any:
    state = {name: t.tolist() for name, t in module.state_dict().items()}
    files = sorted((str(p), p.stat().st_size) for p in folder.rglob("*"))
    metrics = {name: float(v) for name, v in trainer.callback_metrics.items()}
    modes = [part.training for part in module.modules()]
    return state, files, metrics, modes, module.seen, module.trainer is trainer, vars(module).keys()


def test_a_logger_of_one_kind_may_be_talked_to(tmp_path: Path) -> None:
    module = Net()
    trainer = fitted(tmp_path, module)
    trainer._loggers = [Quiet(tmp_path)]
    assert "mse" in judge(trainer, module)


def test_shuffled_data_gives_the_same_batches_and_keeps_its_generator(tmp_path: Path) -> None:
    module = Net()
    generator = torch.Generator().manual_seed(3)
    val = loader(shuffle=True, generator=generator)
    trainer = fitted(tmp_path, module, val=val, limit_val_batches=1)
    state = generator.get_state()
    assert judge(trainer, module) == judge(trainer, module)
    assert torch.equal(generator.get_state(), state)


class Data(pl.LightningDataModule):
    """Scales each batch in a hook of its own, and counts how often it is set up."""

    def __init__(self) -> None:
        super().__init__()
        self.setups: list[str] = []
        self.scaled = 0

    def setup(self, stage: str) -> None:
        self.setups.append(stage)

    def train_dataloader(self) -> Any:
        return loader()

    def val_dataloader(self) -> Any:
        return loader()

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.scaled += 1
        assert self.trainer is not None
        factor = 1.0 if self.trainer.training else 0.0
        return {"x": batch["x"] * factor, "y": batch["y"]}

    def teardown(self, stage: str) -> None:
        self.setups.append(f"-{stage}")


class Asks(Net):
    """Reads its datamodule through its Trainer."""

    def on_validation_epoch_end(self) -> None:
        self.log("scaled", float(self.trainer.datamodule.scaled))  # type: ignore[attr-defined]


def test_the_datamodules_batch_hooks_are_used_and_it_is_not_set_up_again(tmp_path: Path) -> None:
    module, data = Asks(), Data()
    trainer = fitted(tmp_path, module, datamodule=data)
    setups, scaled = list(data.setups), data.scaled
    found = judge(trainer, module)
    assert found["scaled"] > scaled
    with torch.no_grad():
        constant = module.eval()(torch.zeros(1, 4))
    _, y = rows().tensors
    assert found["mse"] == pytest.approx(float((constant - y).square().mean()), rel=1e-5)
    assert data.setups == setups
    assert data.trainer is trainer


class Builds(Net):
    """Makes a fresh layer whenever it is set up, and hands out callbacks."""

    def setup(self, stage: str) -> None:
        self.layer = nn.Linear(4, 1)

    def configure_callbacks(self) -> Any:
        return [ModelCheckpoint(dirpath="never", save_top_k=0)]


def test_a_module_that_builds_in_setup_keeps_its_trained_layers(tmp_path: Path) -> None:
    module = Builds()
    trainer = fitted(tmp_path, module, max_epochs=20, enable_checkpointing=True)
    assert judge(trainer, module)["mse"] < 1.0


class Uncopyable(Net):
    """Holds a lock, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


def test_a_module_that_cannot_be_copied_is_judged_itself_and_put_back(tmp_path: Path) -> None:
    module = Uncopyable()
    trainer = fitted(tmp_path, module)
    module.train()
    module.norm.eval()
    state = {name: t.clone() for name, t in module.state_dict().items()}
    zeros = {name: torch.zeros_like(t) for name, t in state.items()}
    module.seen = 0
    found = judge(trainer, module, zeros)
    assert module.seen == 0
    _, y = rows().tensors
    assert found["mse"] == pytest.approx(float(y.square().mean()), rel=1e-5)
    assert all(torch.equal(t, state[name]) for name, t in module.state_dict().items())
    assert module.training
    assert not module.norm.training
    assert module.trainer is trainer
    assert "setup" not in vars(module)


def test_without_validation_data_there_is_nothing_to_say(tmp_path: Path) -> None:
    module = Net()
    trainer = fitted(tmp_path, module, limit_val_batches=0)
    assert judge(trainer, module) == {}
