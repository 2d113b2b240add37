"""A copy of a module that can be run without a trace on the module, its Trainer or other processes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torchmetrics import Metric

_BUILDERS = ("prepare_data", "setup", "teardown", "configure_model", "configure_callbacks")


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


@contextmanager
def stand_in(module: pl.LightningModule) -> Iterator[pl.LightningModule]:
    """Yield a deep copy of `module`, or where it cannot be copied itself, put back at the end.

    Put back are its parameters, buffers, modes and Trainer, and with a warning: what else its own
    code changes stays changed.
    """
    try:
        guest = copy_module(module)
    except Exception as error:
        rank_zero_warn(
            f"{type(module).__name__} cannot be deep-copied ({type(error).__name__}: {error}), so it "
            "is judged itself: its weights, modes and Trainer are put back afterwards, other state "
            "that its validation_step keeps is not. Make its attributes copyable to avoid this."
        )
    else:
        yield guest
        return
    with _put_back(module):
        yield module


@contextmanager
def _put_back(module: pl.LightningModule) -> Iterator[None]:
    kept = [(t, t.detach().clone()) for t in (*module.parameters(), *module.buffers())]
    modes = [(part, part.training) for part in module.modules()]
    trainer = module._trainer
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.data = value.to(tensor.device)
        for part, training in modes:
            part.training = training
        module._trainer = trainer


@contextmanager
def closed(guest: pl.LightningModule) -> Iterator[None]:
    """Keep a module that is built already from building again, and its metrics from other processes.

    A `setup` or `configure_model` run once more may make fresh layers; metrics that synchronize
    would wait for processes that are not judging.
    """
    for name in _BUILDERS:
        setattr(guest, name, getattr(pl.LightningModule, name).__get__(guest))
    metrics = [part for part in guest.modules() if isinstance(part, Metric)]
    available = [metric.distributed_available_fn for metric in metrics]
    for metric in metrics:
        metric.distributed_available_fn = _alone
    try:
        yield
    finally:
        for name in _BUILDERS:
            delattr(guest, name)
        for metric, function in zip(metrics, available, strict=True):
            metric.distributed_available_fn = function


def _alone() -> bool:
    return False
