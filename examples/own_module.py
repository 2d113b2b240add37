"""A LightningModule of one's own: gradients clipped by their norm, then 4 bits a weight.

    python examples/own_module.py

Ends with a file of 30,621 bytes, 7.44 times smaller than the float network, that keeps its 95.8 % of the digits.
"""

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import nn
from torch.nn import functional as F
from torchmetrics import Accuracy

from clipquant import GradientClipCallback, QuantizeOnFitEnd, load_quantized
from clipquant.clip import Norm
from clipquant.reference import MNIST5k


class Digits(LightningModule):
    """A small convolutional network; nothing in it knows of clipping or quantizing."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2), nn.ReLU(),
            nn.Flatten(), nn.Linear(800, 64), nn.ReLU(), nn.Linear(64, 10),
        )  # fmt: skip
        self.accuracy = Accuracy("multiclass", num_classes=10)

    def forward(self, images):
        return self.net(images)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        return F.cross_entropy(self(images), labels)

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_acc", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main(max_epochs=5):
    """Train and quantize; return the report."""
    seed_everything(42)
    # The metric is a torchmetrics object: it says itself that higher is better.
    quantizer = QuantizeOnFitEnd(bits=4, monitor="val_acc")
    trainer = Trainer(
        max_epochs=max_epochs,
        accelerator="cpu",
        callbacks=[GradientClipCallback(Norm(1.0)), quantizer],
    )
    trainer.fit(Digits(), MNIST5k())
    # What loads it anywhere: the class and the file.
    net = load_quantized(quantizer.artifact_path, Digits()).eval()
    print(net(torch.zeros(1, 1, 28, 28)).shape)
    return quantizer.report


if __name__ == "__main__":
    main()
