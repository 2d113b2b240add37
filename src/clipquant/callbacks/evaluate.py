"""A module judged by its own validation step on its own data; the outer Trainer sees nothing."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

_TALKERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")


def copy_module(module: pl.LightningModule) -> pl.LightningModule:
    """Return a deep copy of a LightningModule that is attached to no Trainer.

    Args:
        module: Any module; its Trainer, if it has one, is neither copied nor changed.
    """
    trainer, module._trainer = module._trainer, None
    try:
        copied = copy.deepcopy(module)
    finally:
        module._trainer = trainer
    copied._metric_attributes = None  # names its metrics by id(): the copies have others
    return copied


def validation_metrics(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return every metric that `module` logs in a validation of its own, in eval mode.

    Args:
        trainer: The Trainer that has fitted; gives the data, the precision and the batch limits.
        module: The module to judge; a copy of it is.

    Returns:
        Name -> value; empty where the Trainer has no validation data.
    """
    loaders = dataloaders(trainer, "val")
    if loaders is None or not is_overridden("validation_step", module, pl.LightningModule):
        return {}
    with isolate_rng(), _quiet():
        judge = pl.Trainer(
            accelerator="cpu",
            devices=1,
            precision=trainer.precision,
            limit_val_batches=trainer.limit_val_batches,
            logger=False,
            callbacks=[],
            enable_checkpointing=False,
            enable_model_summary=False,
            enable_progress_bar=trainer.progress_bar_callback is not None,
        )
        judge.validate(copy_module(module), dataloaders=loaders, verbose=False)
    return {name: float(value) for name, value in judge.callback_metrics.items()}


def dataloaders(trainer: pl.Trainer, stage: str) -> Any:
    """Return the dataloaders of a stage ("train" or "val") asked anew from where fit got them.

    The loaders that the Trainer holds may carry samplers for one process of several; these are
    the user's own. None where there are none.
    """
    loop = trainer.fit_loop if stage == "train" else trainer.fit_loop.epoch_loop.val_loop
    source = loop._data_source
    if source.instance is None or not source.is_defined():
        return None
    if source.is_module():
        return getattr(source.instance, source.name)()
    return source.instance


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a nested Trainer from announcing the hardware a second time."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
