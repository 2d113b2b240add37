"""Calibration from a real Trainer's data, through the module's own step."""

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader

from clipquant import QuantizeOnFitEnd

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class OddBatches(pl.LightningModule):
    """Batches are dicts of named images that only the module's own steps can take apart."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(16, 4)
        self.seen = 0

    def forward(self, *_):
        raise AssertionError("the step does without forward")

    def training_step(self, batch, _):
        return self.net(batch["deep"]["x"]).square().mean()

    def validation_step(self, batch, _):
        assert self.trainer is not None
        self.log("val_loss", self.net(batch["deep"]["x"]).square().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def data():
    torch.manual_seed(0)
    return DataLoader([{"deep": {"x": torch.randn(16)}} for _ in range(64)], 8, shuffle=True)


def fit(tmp_path, **arguments):
    pl.seed_everything(0, verbose=False)
    callback = QuantizeOnFitEnd(3, **arguments)
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **QUIET)
    trainer.fit(OddBatches(), data(), data())
    return callback


def test_low_widths_are_calibrated_through_the_validation_step(tmp_path):
    callback = fit(tmp_path, method="gptq")
    assert [layer.method for layer in callback.report.layers] == ["gptq"]
    assert callback.report.calibration == "8 batches of the train dataloader"


def test_the_same_seed_gives_the_same_file(tmp_path):
    one, two = fit(tmp_path / "one"), fit(tmp_path / "two")
    assert one.artifact_path.read_bytes() == two.artifact_path.read_bytes()


def test_zero_batches_are_data_free(tmp_path):
    callback = fit(tmp_path, calibration_batches=0)
    assert callback.report.calibration == ""
    assert [layer.method for layer in callback.report.layers] == ["mse"]
