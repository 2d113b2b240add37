"""A nested Trainer announces nothing: what the outer one has said once is not said again."""

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


@pytest.mark.parametrize("bits", [4, 8])
def test_hardware_tips_and_limits_are_announced_by_the_outer_trainer_alone(tmp_path, caplog, bits):
    data = DataLoader(TensorDataset(torch.randn(32, 8)), 8)
    caplog.set_level("INFO")
    trainer = pl.Trainer(
        max_epochs=1, callbacks=[QuantizeOnFitEnd(bits, dirpath=tmp_path)], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu",
    )  # fmt: skip
    trainer.fit(Small(), data, data)
    said = [record.getMessage() for record in caplog.records]
    for words in ("GPU available", "limit_val_batches", "Tip"):
        assert sum(words in line for line in said) <= 1, words
