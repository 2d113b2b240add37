"""Calibration from the Trainer's own data: its train batches, run through the module's own step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng
from torch import nn

from clipquant.callbacks.evaluate import dataloaders
from clipquant.quant.observe import Forward, calibration_data, call_model


def train_batches(trainer: pl.Trainer) -> Iterator[Any]:
    """Yield batches of the train data, or of the validation data where there are none, on the CPU."""
    for stage in ("train", "val"):
        loaders = dataloaders(trainer, stage)
        if loaders is not None:
            for batch, _, _ in iter(CombinedLoader(loaders, "sequential")):
                yield move_data_to_device(batch, "cpu")
            return


def calibration_batches(trainer: pl.Trainer, count: int, seed: int = 0) -> list[Any]:
    """Return the first `count` train batches, the same for the same seed; random state is left as it was.

    Args:
        trainer: The Trainer that has fitted.
        count: How many; 0: none.
        seed: Of shuffling and of the train transforms.

    Raises:
        ValueError: If the data are empty.
        RuntimeError: If the loader raises, naming the batch.
    """
    if count == 0:
        return []
    with isolate_rng():
        torch.manual_seed(seed)
        return calibration_data(train_batches(trainer), count)


def step_forward(trainer: pl.Trainer, module: pl.LightningModule) -> Forward:
    """Return what runs a copy of `module` on a batch: its `validation_step`, or else its `forward`.

    The step sees the outer Trainer, and what it logs goes nowhere.

    Args:
        trainer: What `self.trainer` is during the step.
        module: Tells whether there is a `validation_step` of its own.
    """
    if not is_overridden("validation_step", module, pl.LightningModule):
        return call_model

    def run(model: nn.Module, batch: Any) -> Any:
        guest: Any = model
        guest._trainer = trainer
        guest.log = guest.log_dict = _ignore
        try:
            batch = guest.on_after_batch_transfer(guest.on_before_batch_transfer(batch, 0), 0)
            return guest.validation_step(batch, 0)
        finally:
            guest._trainer = None
            del guest.log, guest.log_dict

    return run


def _ignore(*_: Any, **__: Any) -> None:
    return None
