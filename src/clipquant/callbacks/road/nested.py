"""A Trainer of the outer Trainer's own package on one device, that stands where the outer one does."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from typing import Any

import lightning.pytorch as pl
import torch

from clipquant.callbacks.lightning import Callback, package_of
from clipquant.callbacks.road.silence import Silence


class _Host(Callback):
    """Lends the outer datamodule and its batch hooks to the inner Trainer.

    Args:
        datamodule: The outer Trainer's, if it has one.
        hooks: Whether its batch hooks are used.
    """

    def __init__(self, datamodule: Any, hooks: bool) -> None:
        self.datamodule, self.hooks = datamodule, hooks

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Connect the datamodule, too late for the Trainer to set it up a second time."""
        trainer.datamodule = self.datamodule  # type: ignore[attr-defined]
        if self.datamodule is not None and self.hooks:
            trainer._data_connector._datahook_selector.datamodule = self.datamodule  # type: ignore[union-attr]

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.datamodule = None  # type: ignore[attr-defined]

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        trainer.datamodule = None  # type: ignore[attr-defined]


@contextmanager
def nested_trainer(
    trainer: pl.Trainer,
    silence: Silence,
    *,
    limit: Any = 1.0,
    hooks: bool = True,
) -> Iterator[pl.Trainer]:
    """Yield a Trainer that validates by itself, writes nothing, and knows what the outer one knows.

    Precision, progress, optimizers, schedulers, data and loggers are found where user code looks for
    them: the loggers are silent, and what user code does to schedulers and optimizers is undone.

    Args:
        trainer: The outer Trainer.
        silence: Gives its loggers' stand-ins.
        limit: As `limit_val_batches`.
        hooks: Whether the datamodule's batch hooks are used.
    """
    datamodule = trainer.datamodule  # type: ignore[attr-defined]
    outer = None if datamodule is None else datamodule.trainer
    with _kept_flags(), _kept_schedules(trainer):
        with silence.quiet():
            inner = _inner(trainer, silence, _Host(datamodule, hooks), limit)
        _stand_where_(inner, trainer)
        try:
            if datamodule is not None:
                datamodule.trainer = inner
            yield inner
        finally:
            if datamodule is not None:
                datamodule.trainer = outer


def _inner(trainer: pl.Trainer, silence: Silence, host: Any, limit: Any) -> pl.Trainer:
    package = package_of(trainer)
    environments = import_module(f"{package.__name__}.plugins.environments")
    device = trainer.strategy.root_device
    on_gpu = device.type in ("cuda", "mps")
    made: pl.Trainer = package.Trainer(
        accelerator=device.type if on_gpu else "cpu",
        devices=[device.index or 0] if device.type == "cuda" else 1,
        plugins=[
            copy.copy(trainer.precision_plugin),
            environments.LightningEnvironment(),  # not SLURM's, which counts tasks
        ],
        limit_val_batches=limit,
        logger=list(silence.loggers),
        callbacks=[host],
        max_epochs=trainer.max_epochs,
        max_steps=trainer.max_steps,
        # What learns from a pass needs tensors that inference does not give.
        inference_mode=False,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        default_root_dir=trainer.default_root_dir,
    )
    return made


def _stand_where_(inner: pl.Trainer, trainer: pl.Trainer) -> None:
    """Tell the inner Trainer the outer one's epoch, step, optimizers and schedulers."""
    epoch = inner.fit_loop.epoch_progress.current
    epoch.processed = epoch.completed = trainer.current_epoch  # type: ignore[attr-defined]
    steps = inner.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step.total
    steps.completed = trainer.global_step
    inner.strategy._optimizers = list(trainer.strategy._optimizers)
    inner.strategy._lightning_optimizers = list(trainer.strategy._lightning_optimizers)
    inner.strategy.lr_scheduler_configs = list(trainer.strategy.lr_scheduler_configs)
    inner.callback_metrics.update(trainer.callback_metrics)
    inner.strategy.teardown = partial(_teardown, inner.strategy, inner.strategy.teardown)  # type: ignore[method-assign]
    for name in ("max_batches", "_combined_loader"):
        with suppress(
            AttributeError
        ):  # private to Lightning, for user code that asks how long an epoch is
            setattr(inner.fit_loop, name, getattr(trainer.fit_loop, name))


def _teardown(strategy: Any, teardown: Any) -> None:
    """Let a strategy end without moving the optimizers, which are the outer one's."""
    strategy._optimizers = []
    teardown()


@contextmanager
def _kept_flags() -> Iterator[None]:
    """Put back the switches of torch that making a Trainer sets."""
    strict, warn = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    benchmark = torch.backends.cudnn.benchmark
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(strict, warn_only=warn)
        torch.backends.cudnn.benchmark = benchmark


@contextmanager
def _kept_schedules(trainer: pl.Trainer) -> Iterator[None]:
    """Put back schedulers and the settings of optimizers, which validation hooks may step."""
    schedulers = [config.scheduler for config in trainer.strategy.lr_scheduler_configs]
    groups = [g for optimizer in trainer.strategy._optimizers for g in optimizer.param_groups]
    held: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (own, {k: list(v) if type(v) is list else v for k, v in own.items()})
        for own in (*map(vars, schedulers), *groups)
    ]
    try:
        yield
    finally:
        for own, values in held:
            own.clear()
            own.update(values)
