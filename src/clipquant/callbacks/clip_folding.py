"""Whether the optimizer's own step may clip: it must be able to, and nobody may read the gradients before it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from clipquant.callbacks.lightning import is_overridden
from clipquant.clip.assign import Assignment
from clipquant.clip.fold import can_fold, can_skip

_LATER_HOOKS = ("on_before_optimizer_step", "configure_gradient_clipping")


def may_fold(optimizer: Optimizer, assignment: Assignment) -> bool:
    """Return whether one coefficient for all gradients is what clips, and the step applies one."""
    part = assignment.whole
    return part is not None and bool(getattr(part.rule, "folds", False)) and can_fold(optimizer)


def policy_on(
    device: torch.device,
    callback: Any,
    trainer: pl.Trainer,
    pl_module: pl.LightningModule,
    optimizer: Optimizer,
) -> Any:
    """Return what non-finite gradients on a device lead to: "defer" where the step itself decides there to skip."""
    if callback.on_nonfinite != "skip" or device.type == "cpu" or not can_skip(optimizer):
        return callback.on_nonfinite
    return "defer" if is_last_reader(callback, trainer, pl_module) else "skip"


def is_last_reader(callback: Any, trainer: pl.Trainer, pl_module: pl.LightningModule) -> bool:
    """Return whether neither the module nor a later callback reads or scales the gradients before the step."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    later = callbacks[callbacks.index(callback) + 1 :]
    return not (
        any(is_overridden(hook, pl_module) for hook in _LATER_HOOKS)
        or any(is_overridden(_LATER_HOOKS[0], each) for each in later)
    )
