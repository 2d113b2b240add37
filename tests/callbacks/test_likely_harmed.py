"""The end of a fit says once which weights are likely harmed, though no metric is logged."""

from __future__ import annotations

import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clipquant import QuantizeOnFitEnd


class Plain(pl.LightningModule):
    """No metric, no validation."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("how", "harmed"), [({"bits": 2, "method": "rtn"}, True), ({"bits": 4}, False), ({}, False)]
)
def test_one_warning_and_the_verdict_name_them(how, harmed, tmp_path):
    torch.manual_seed(0)
    callback = QuantizeOnFitEnd(dirpath=tmp_path, **how)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
    )  # fmt: skip
    loader = DataLoader(TensorDataset(torch.randn(64, 64)), batch_size=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Plain(), loader)
    said = [str(w.message) for w in caught if "likely harmed" in str(w.message)]
    assert len(said) == harmed
    report = json.loads((tmp_path / "report.json").read_text())
    assert ("likely harmed: net.0.weight" in report["verdict"]) == harmed
    assert report["harmed"] == (["net.0.weight", "net.2.weight"] if harmed else [])
