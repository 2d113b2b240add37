"""A nested Trainer announces nothing: what the outer one has said once is not said again."""

import logging

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd


class Small(pl.LightningModule):
    """A layer and its mean squared error."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def training_step(self, batch, _):
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, _):
        self.log("val_loss", self.layer(batch[0]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Data(pl.LightningDataModule):
    """Both loaders over the same random rows."""

    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(32, 8)), 8)

    val_dataloader = train_dataloader


@pytest.mark.parametrize("bits", [4, 8])
def test_hardware_tips_and_limits_are_announced_by_the_outer_trainer_alone(
    tmp_path, monkeypatch, bits
):
    said = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    for name in ("lightning.pytorch", "pytorch_lightning"):  # they hand nothing on to the root
        monkeypatch.setattr(logging.getLogger(name), "handlers", [handler])
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[QuantizeOnFitEnd(bits, dirpath=tmp_path)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Small(), Data())
    assert any("GPU available" in line for line in said)
    for words in ("GPU available", "limit_val_batches", "Tip"):
        assert sum(words in line for line in said) <= 1, words
