"""A module judged by its own validation step on its own data; the outer Trainer sees nothing."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipquant.callbacks.data import kept_generators, validation_data
from clipquant.callbacks.guest import closed, stand_in

_TALKERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")


def judge(
    trainer: pl.Trainer, module: pl.LightningModule, state: Mapping[str, Tensor] | None = None
) -> dict[str, float]:
    """Return every metric that a validation of `module` logs, run by a Trainer of its own on one device.

    Runs the module's own `validation_step` on its own data, the same batches each time, and leaves
    no trace: the module, the outer Trainer, its callbacks, loggers, datamodule and random state are
    as they were.

    Args:
        trainer: The Trainer that has fitted; gives the data, the precision and the batch limits.
        module: The module to judge.
        state: Weights to judge instead of the module's own.

    Returns:
        Name -> value; empty where the Trainer has no validation data.
    """
    loaders = validation_data(trainer, module)
    if loaders is None:
        return {}
    _end_progress(trainer)
    with ExitStack() as stack:
        stack.enter_context(isolate_rng())
        stack.enter_context(kept_generators(loaders))
        stack.enter_context(_quiet())
        guest = stack.enter_context(stand_in(module))
        if state is not None:
            guest.load_state_dict(dict(state), strict=False)
        stack.enter_context(closed(guest))
        host = stack.enter_context(_hosted(trainer.datamodule))  # type: ignore[attr-defined]
        inner = _inner_trainer(trainer, host)
        inner.validate(guest, dataloaders=loaders, verbose=False)
        return {name: float(value) for name, value in inner.callback_metrics.items()}


def _end_progress(trainer: pl.Trainer) -> None:
    """End the fit's progress bar where it is rich's, whose screen holds one live display at a time."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, trainer.lightning_module, "fit")


class _Host(pl.Callback):
    """Lends the outer datamodule's batch hooks to the inner Trainer."""

    def __init__(self, datamodule: pl.LightningDataModule | None) -> None:
        self.datamodule = datamodule

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the datamodule, too late for the Trainer to set it up a second time."""
        if self.datamodule is not None:
            trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
            trainer._data_connector._datahook_selector.datamodule = self.datamodule  # type: ignore[union-attr]
            self.datamodule.trainer = trainer

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.datamodule = None  # type: ignore[attr-defined]


@contextmanager
def _hosted(datamodule: pl.LightningDataModule | None) -> Iterator[_Host]:
    outer = None if datamodule is None else datamodule.trainer
    try:
        yield _Host(datamodule)
    finally:
        if datamodule is not None:
            datamodule.trainer = outer


def _inner_trainer(trainer: pl.Trainer, host: pl.Callback) -> pl.Trainer:
    """Return a Trainer on one device that stands where the outer one does, and writes nothing."""
    device = trainer.strategy.root_device
    on_gpu = device.type in ("cuda", "mps")
    inner = pl.Trainer(
        accelerator=device.type if on_gpu else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        precision=trainer.precision,
        limit_val_batches=trainer.limit_val_batches,
        logger=[DummyLogger() for _ in trainer.loggers],
        callbacks=[host],
        inference_mode=trainer.validate_loop.inference_mode,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=trainer.progress_bar_callback is not None,
        default_root_dir=trainer.default_root_dir,
    )
    epoch = inner.fit_loop.epoch_progress.current
    epoch.processed = epoch.completed = trainer.current_epoch  # type: ignore[attr-defined]
    steps = inner.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.completed = trainer.global_step
    return inner


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep a nested Trainer from announcing the hardware and the loaders' workers a second time."""
    loggers = [logging.getLogger(name) for name in _TALKERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            warnings.filterwarnings("ignore", message=".*infer the `batch_size`.*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
