"""Where a callback's files go."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from itertools import count, islice
from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clipquant.callbacks.road.ranks import from_first

FILE = "model.safetensors"


def folder_of(trainer: pl.Trainer, callback: Any, others: Sequence[Any]) -> Path:
    """Return where a callback's files go; every process must ask, the log directory is told by the first.

    Args:
        trainer: Tells the log directory.
        callback: Tells its `dirpath`, if it was given one.
        others: Every one of its kind in the Trainer, itself included: those without a `dirpath` take
            `quantized`, `quantized-2` and so on under the log directory, of those that hold no file yet.
    """
    base = trainer.log_dir or trainer.default_root_dir
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        # A dry run goes the whole way, and must not write where a real one has.
        return Path(from_first(tempfile.mkdtemp(prefix="clipquant-fast-dev-run-")))
    if callback.dirpath is not None:
        return Path(callback.dirpath)
    place = [other for other in others if other.dirpath is None].index(callback)
    return Path(from_first(str(_free(Path(base), place))))


def _free(base: Path, place: int) -> Path:
    """Return the folder of the callback at a place: the next after those that hold a file, so that none is replaced."""
    folders = (base / (f"quantized-{number}" if number > 1 else "quantized") for number in count(1))
    free = (folder for folder in folders if not (folder / FILE).exists())
    return next(islice(free, place, None))
