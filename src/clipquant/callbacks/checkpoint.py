"""What the Trainer's ModelCheckpoint says: which weights were best."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from clipquant.callbacks.lightning import package_of
from clipquant.errors import ArgumentError
from clipquant.quant.network.bare import bare_key


def logged_name(monitor: str, metrics: Mapping[str, float]) -> str:
    """Return the name under which a metric was logged: its own, or with the suffix of the first of several loaders.

    >>> logged_name("val_loss", {"val_loss/dataloader_idx_0": 1.0, "val_loss/dataloader_idx_1": 2.0})
    'val_loss/dataloader_idx_0'
    """
    if monitor in metrics:
        return monitor
    return next(
        (name for name in metrics if name.startswith(f"{monitor}/dataloader_idx_")), monitor
    )


def check_best(trainer: pl.Trainer) -> None:
    """Raise before training where no best weights can be kept.

    Raises:
        ValueError: If there is no ModelCheckpoint, or none that keeps a best checkpoint.
    """
    if getattr(trainer, "fast_dev_run", False):
        return  # a dry run keeps no checkpoint and quantizes the last weights
    if not trainer.checkpoint_callbacks:
        raise ArgumentError(
            "weights='best' needs a ModelCheckpoint callback, and the Trainer has none. "
            "Add one, or use weights='last'."
        )
    own = _checkpoints(trainer)
    if own and all(callback.save_top_k == 0 for callback in own):
        raise ArgumentError(
            "weights='best' needs a ModelCheckpoint that keeps a best checkpoint; got save_top_k=0. "
            "Set save_top_k=1 and a monitor, or use weights='last'."
        )


def load_best(trainer: pl.Trainer, module: pl.LightningModule, monitor: str) -> dict[str, Any]:
    """Load into `module` the weights of the best checkpoint, as Lightning itself loads them; return it.

    Args:
        trainer: The Trainer that has fitted.
        module: Gets the weights, through its own `on_load_checkpoint`.
        monitor: The metric that judges; where several callbacks keep checkpoints, the one that
            monitors it is asked.

    Raises:
        ValueError: If none was kept.
    """
    path = _best_path(trainer, monitor)
    if not path:
        raise ArgumentError(
            "weights='best' found no best checkpoint: ModelCheckpoint has saved none. "
            "Give it a monitor that is logged, or use weights='last'."
        )
    checkpoint = _read(Path(path), trainer)
    module.on_load_checkpoint(checkpoint)
    state = {bare_key(key): value for key, value in checkpoint["state_dict"].items()}
    module.load_state_dict(state, strict=module.strict_loading)
    return checkpoint


def _read(path: Path, trainer: pl.Trainer) -> dict[str, Any]:
    """Return a checkpoint that the fit has just written, hyper-parameters of any class included."""
    if path.is_dir():  # each process has written its part
        name = package_of(trainer).__name__.replace(".pytorch", ".fabric")
        name = name.replace("pytorch_lightning", "lightning_fabric")
        held = import_module(f"{name}.utilities.load")._load_distributed_checkpoint(path)
        return {**held, "state_dict": held.get("state_dict", held.get("model"))}
    checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False)
    return checkpoint


def _best_path(trainer: pl.Trainer, monitor: str) -> str:
    callbacks = [c for c in trainer.checkpoint_callbacks if getattr(c, "best_model_path", "")]
    callbacks.sort(key=lambda c: _distance(c, monitor))
    return str(callbacks[0].best_model_path) if callbacks else ""  # type: ignore[attr-defined]


def _distance(callback: Any, monitor: str) -> tuple[bool, bool]:
    own = getattr(callback, "monitor", None)
    return own != monitor, own is None


def _checkpoints(trainer: pl.Trainer) -> list[Any]:
    kind = package_of(trainer).callbacks.ModelCheckpoint
    return [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, kind)]
