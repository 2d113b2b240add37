"""What the Trainer's ModelCheckpoint says: which metric judges, and which weights were best."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint


def monitored(trainer: pl.Trainer, monitor: str | None, mode: str | None) -> tuple[str, str]:
    """Return which metric judges and which way: as given, else ModelCheckpoint's, else val_loss."""
    for callback in trainer.checkpoint_callbacks:
        own = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if own is not None and monitor in (None, own):
            return own, mode or callback.mode  # type: ignore[attr-defined]
    return monitor or "val_loss", mode or "min"


def load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Load into `module` the weights of the best checkpoint that the Trainer has kept."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        raise ValueError(
            "weights='best' found no best checkpoint: ModelCheckpoint has saved none. "
            "Give it a monitor, or use weights='last'."
        )
    checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
