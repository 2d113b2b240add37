"""The two-convolution network that the examples, tests and benchmarks share."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from clipquant.errors import ArgumentError

Schedule = Literal["constant", "cosine", "one_cycle"]
Batch = tuple[Tensor, Tensor]


class TwoConvNet(LightningModule):
    """Two 3x3 convolutions and the head of the well-known MNIST example; its logits have shape (N, classes).

    Logs ``train_loss`` at every logging step, ``val_loss`` and ``val_acc`` after validation and ``test_acc`` after
    testing. The metrics keep no entry in the ``state_dict``, which holds the four layers' weights and biases alone.

    Args:
        num_classes: number of classes, at least 2.
        optimizer: name of a class in ``torch.optim``, as ``"AdamW"`` or ``"SGD"``.
        lr: learning rate; the peak of it where a schedule changes it.
        optimizer_args: further keyword arguments of the optimizer, as ``{"momentum": 0.9}``.
        schedule: ``"constant"``, ``"cosine"`` (down to 0 over the whole run) or ``"one_cycle"`` (warm-up over the
            first 30 % of the run, then down to nearly 0; Smith and Topin, 1708.07120; momentum stays
            as it is). Stepped once a training step.

    Raises:
        ValueError: where ``num_classes`` is below 2, or ``optimizer`` or ``schedule`` is not one of those above.

    Example:
        >>> net = TwoConvNet()
        >>> images = torch.zeros(5, 1, 28, 28)
        >>> net(images).shape, net.forward_features(images).shape
        (torch.Size([5, 10]), torch.Size([5, 64, 24, 24]))
        >>> sorted(net.state_dict())[:4]
        ['conv1.bias', 'conv1.weight', 'conv2.bias', 'conv2.weight']
    """

    def __init__(
        self,
        num_classes: int = 10,
        optimizer: str = "AdamW",
        lr: float = 1e-3,
        optimizer_args: dict[str, Any] | None = None,
        schedule: Schedule = "constant",
    ) -> None:
        super().__init__()
        _check_settings(num_classes, optimizer, schedule)
        self.save_hyperparameters()
        self.optimizer_name, self.lr, self.schedule = optimizer, lr, schedule
        self.optimizer_args = dict(optimizer_args or {})
        self.example_input_array = torch.zeros(1, 1, 28, 28)
        self.conv1 = nn.Conv2d(1, 32, 3, 1)
        self.conv2 = nn.Conv2d(32, 64, 3, 1)
        self.dropout1 = nn.Dropout(0.25)
        self.dropout2 = nn.Dropout(0.5)
        self.fc1 = nn.Linear(9216, 128)
        self.fc2 = nn.Linear(128, num_classes)
        self.val_acc = MulticlassAccuracy(num_classes, average="micro")
        self.test_acc = MulticlassAccuracy(num_classes, average="micro")

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to the activations (N, 64, 24, 24) after the second convolution's ReLU."""
        return F.relu(self.conv2(F.relu(self.conv1(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, 28, 28) to logits (N, classes)."""
        x = self.dropout1(F.max_pool2d(self.forward_features(x), 2))
        x = self.dropout2(F.relu(self.fc1(torch.flatten(x, 1))))
        logits: Tensor = self.fc2(x)
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch (images, labels)."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``val_loss`` and ``val_acc``, both over all validation images."""
        images, labels = batch
        logits = self(images)
        self.val_acc(logits, labels)
        self.log("val_loss", F.cross_entropy(logits, labels), prog_bar=True, batch_size=len(labels))
        self.log("val_acc", self.val_acc, prog_bar=True, batch_size=len(labels))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Log ``test_acc`` over all test images."""
        images, labels = batch
        self.test_acc(self(images), labels)
        self.log("test_acc", self.test_acc, batch_size=len(labels))

    def predict_step(self, batch: Tensor | Batch, batch_idx: int = 0) -> Tensor:
        """Return the logits (N, classes) of images, given alone or with labels, which are ignored."""
        images = batch if isinstance(batch, Tensor) else batch[0]
        logits: Tensor = self(images)
        return logits

    def configure_optimizers(self) -> Any:
        """Return the optimizer, with the schedule stepped once a training step where there is one."""
        optimizer = getattr(torch.optim, self.optimizer_name)(
            self.parameters(), lr=self.lr, **self.optimizer_args
        )
        if self.schedule == "constant":
            return optimizer
        steps = max(1, int(self.trainer.estimated_stepping_batches))
        scheduler = _make_scheduler(optimizer, self.schedule, self.lr, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def _make_scheduler(
    optimizer: torch.optim.Optimizer, schedule: Schedule, lr: float, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps, cycle_momentum=False
    )


def _check_settings(num_classes: int, optimizer: str, schedule: str) -> None:
    if num_classes < 2:
        raise ArgumentError(
            f"num_classes must be at least 2, got {num_classes}: pass the number of labels in the data."
        )
    found = getattr(torch.optim, optimizer, None)
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise ArgumentError(
            f"optimizer must name a class in torch.optim, got {optimizer!r}: write it as 'AdamW', 'SGD' or 'Adagrad'."
        )
    if schedule not in ("constant", "cosine", "one_cycle"):
        raise ArgumentError(
            f"schedule must be 'constant', 'cosine' or 'one_cycle', got {schedule!r}."
        )
