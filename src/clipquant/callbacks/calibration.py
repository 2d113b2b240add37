"""Calibration batches run through the module's own step."""

from __future__ import annotations

from inspect import signature
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from clipquant.quant.network.calibration import Forward, call_model


def step_forward(trainer: pl.Trainer, module: pl.LightningModule) -> Forward:
    """Return what runs a copy of `module` on a batch: its `validation_step`, or else its `forward`.

    The step sees the outer Trainer, and what it logs goes nowhere.

    Args:
        trainer: What `self.trainer` is during the step.
        module: Tells whether there is a `validation_step` of its own.
    """
    if not is_overridden("validation_step", module, pl.LightningModule):
        return call_model

    place = (0,) if "dataloader_idx" in signature(module.validation_step).parameters else ()

    def run(model: nn.Module, batch: Any) -> Any:
        guest: Any = model
        guest._trainer = trainer
        guest.log = guest.log_dict = _ignore
        try:
            batch = guest.on_after_batch_transfer(guest.on_before_batch_transfer(batch, 0), 0)
            return guest.validation_step(batch, 0, *place)
        finally:
            guest._trainer = None
            del guest.log, guest.log_dict

    return run


def _ignore(*_: Any, **__: Any) -> None:
    return None
