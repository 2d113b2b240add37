"""A module judged by its own validation step on its own data; the outer Trainer sees nothing."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities.data import extract_batch_size
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from clipquant.callbacks.data import kept_generators, validation_data
from clipquant.callbacks.guest import closed, stand_in

_TALKERS = ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.accelerators.cuda")


@dataclass(frozen=True)
class Judgement:
    """What a validation found.

    Args:
        metrics: Name -> value of all that the module logged; empty without validation data.
        milliseconds: Of each validation step but the first.
        batch: Samples in the first batch; 0 where that cannot be told.
    """

    metrics: Mapping[str, float] = field(default_factory=dict)
    milliseconds: tuple[float, ...] = ()
    batch: int = 0

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.milliseconds) if self.milliseconds else None


def validation_metrics(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, float]:
    """Return every metric that `module` logs in a validation of its own, in eval mode.

    Args:
        trainer: The Trainer that has fitted; gives the data, the precision and the batch limits.
        module: The module to judge; a copy of it is.

    Returns:
        Name -> value; empty where the Trainer has no validation data.
    """
    return dict(judge(trainer, module).metrics)


def judge(
    trainer: pl.Trainer, module: pl.LightningModule, state: Mapping[str, Tensor] | None = None
) -> Judgement:
    """Return what a validation of `module` finds, run by a Trainer of its own on one device.

    Runs the module's own `validation_step` on its own data, the same batches each time, and leaves
    no trace: the module, the outer Trainer, its callbacks, loggers, datamodule and random state are
    as they were.

    Args:
        trainer: The Trainer that has fitted; gives the data, the precision and the batch limits.
        module: The module to judge.
        state: Weights to judge instead of the module's own.
    """
    loaders = validation_data(trainer, module)
    if loaders is None:
        return Judgement()
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
        metrics = {name: float(value) for name, value in inner.callback_metrics.items()}
    return Judgement(metrics, tuple(host.milliseconds), host.batch)


def _end_progress(trainer: pl.Trainer) -> None:
    """End the fit's progress bar where it is rich's, whose screen holds one live display at a time."""
    bar = trainer.progress_bar_callback
    if isinstance(bar, RichProgressBar):
        bar.teardown(trainer, trainer.lightning_module, "fit")


class _Host(pl.Callback):
    """Lends the outer datamodule's batch hooks to the inner Trainer, and times its steps."""

    def __init__(self, datamodule: pl.LightningDataModule | None) -> None:
        self.datamodule = datamodule
        self.milliseconds: list[float] = []
        self.batch = 0
        self._start = 0.0
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the datamodule, too late for the Trainer to set it up a second time."""
        if self.datamodule is not None:
            trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
            trainer._data_connector._datahook_selector.datamodule = self.datamodule  # type: ignore[union-attr]
            self.datamodule.trainer = trainer

    def on_validation_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, *args: Any
    ) -> None:
        if not self.batch:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.batch = _batch_size(batch)
        self._start = time.perf_counter()

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any
    ) -> None:
        if self._steps:
            self.milliseconds.append(1e3 * (time.perf_counter() - self._start))
        self._steps += 1

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


def _batch_size(batch: Any) -> int:
    try:
        return extract_batch_size(batch)
    except Exception:  # a batch of unknown make has no size; only a label of the report wants it
        return 0


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
