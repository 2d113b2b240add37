"""What is said, and cleared away, when somebody stops a run: what is whole, and the line that goes on from there."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.settings import Settings


def stopped_at_end(
    settings: Settings, trainer: pl.Trainer, folder: Path, saved: Path | None
) -> str:
    """Return what to tell of a run that was stopped after its training, while it was quantized.

    Args:
        settings: What the callback was asked.
        trainer: Tells the checkpoints and the configuration.
        folder: Where the file goes.
        saved: The file, where it was written already.
    """
    if saved is not None:
        return (
            f"Stopped after the file was written: {saved} is whole, and the fit was complete. What is measured "
            f"and exported after it is missing; `clipquant report {saved}` shows what it holds, "
            "`clipquant export` makes other formats from it"
        )
    return (
        "Stopped while quantizing: the fit was complete, no file was written. The module holds its float weights. "
        f"{_again(settings, trainer, folder)}"
    )


def _again(settings: Settings, trainer: pl.Trainer, folder: Path) -> str:
    """Return how to repeat the step, from a checkpoint where there is one."""
    checkpoint = checkpoint_of(trainer)
    config = (
        Path(trainer.log_dir or trainer.default_root_dir) / "config.yaml"
    )  # as LightningCLI leaves it
    if checkpoint and config.is_file():
        return f"Repeat the step: clipquant quantize --config {config} --ckpt_path {checkpoint}"
    file = str(folder / "model.safetensors")
    if checkpoint:
        kind = type(trainer.lightning_module).__name__
        return (
            f"Repeat it without the search: module = {kind}.load_from_checkpoint({checkpoint!r}); "
            f"{settings.line(file)}"
        )
    return f"No checkpoint was kept; in this process: {settings.line(file)}"


def checkpoint_of(trainer: pl.Trainer) -> str:
    """Return the last checkpoint that a Trainer has written, or else its best; empty where there is none."""
    found: list[Any] = [
        getattr(callback, name, "")
        for name in ("last_model_path", "best_model_path")
        for callback in trainer.checkpoint_callbacks
    ]
    return next((str(path) for path in found if path and Path(path).exists()), "")


def clear_away(folder: Path | None) -> None:
    """Remove a folder that holds nothing."""
    if folder is not None:
        with suppress(OSError):  # not empty, or not there
            folder.rmdir()
