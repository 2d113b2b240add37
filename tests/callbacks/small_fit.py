"""A network and data small enough to fit in a blink, for tests of callbacks in real fits."""

from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Small(pl.LightningModule):
    """A classifier of 8x8 images."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, i):
        self.log("val_loss", nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader(numel=64):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(numel, 1, 8, 8, generator=generator)
    return DataLoader(
        TensorDataset(images, torch.randint(0, 10, (numel,), generator=generator)), 16
    )


def fit(callback, folder, model=None, callbacks=(), **arguments):
    """Fit a module on four batches an epoch; return the Trainer and the module."""
    model = model or Small()
    arguments = {"max_epochs": 1, "enable_checkpointing": False, **QUIET, **arguments}
    trainer = pl.Trainer(callbacks=[callback, *callbacks], default_root_dir=folder, **arguments)
    trainer.fit(model, loader(), loader())
    return trainer, model


class Net(pl.LightningModule):
    """A classifier of rows with dropout, which counts its steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 3))
        self.trained = self.validated = 0

    def forward(self, x: Any) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, _: int) -> Any:
        self.trained += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, _: int) -> None:
        self.validated += 1
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)


def rows(shuffle: bool = False) -> Any:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16, shuffle=shuffle)
