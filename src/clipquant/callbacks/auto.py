"""Bits chosen for a trained module: sensitivities from its own training data, its own metric as judge."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count, islice
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from clipquant.callbacks.calibration import step_forward
from clipquant.callbacks.data import calibration_batches, train_batches
from clipquant.callbacks.evaluate import judge
from clipquant.model import QuantizedModel
from clipquant.model.auto import AutoBits, Seen, quantize_auto
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.twin import twin_of
from clipquant.quant.widths.sensitivity import output_divergence, squared_gradients
from clipquant.report.progress import progress_bar


def choose_bits(
    trainer: pl.Trainer,
    module: pl.LightningModule,
    goal: AutoBits,
    batches: int,
    before: Mapping[str, float],
) -> QuantizedModel:
    """Return a module with the bits that meet a goal.

    Args:
        trainer: The Trainer that has fitted.
        module: A copy of the module, attached to no Trainer.
        goal: What is asked.
        batches: Batches of the training data for the sensitivities.
        before: Metrics of the float module; none: only a size can be met.

    Raises:
        ValueError: If there is no training data, or the goal cannot be asked.
    """
    module.eval()
    loss = _Loss()
    targets = goal.recipe.select(module).targets
    with isolate_rng(), _without_log_warnings():
        torch.manual_seed(0)
        seen = Calibration(_training_batches(trainer, batches))
        fisher = squared_gradients(module, targets, seen, loss)
    module.zero_grad(set_to_none=True)
    data, forward = calibration_batches(trainer, batches), step_forward(trainer, module)
    trials = count(1)

    def measure(weights: QuantizedWeights) -> Mapping[str, float]:
        metrics = judge(trainer, module, weights.state_dict())
        value = metrics.get(goal.monitor)
        rank_zero_info(f"Budget search, trial {next(trials)}: {goal.monitor} = {value}")
        return metrics

    with progress_bar(trainer.progress_bar_callback is not None) as tell:
        known = Seen(fisher, Calibration(data, forward, tell))
        judged = measure if before else None
        quantized = quantize_auto(twin_of(module), goal, known, before, judged)
    said = f"{batches} batches of the train dataloader, by the {loss.what}"
    return quantized.reported(calibration=said)


def _training_batches(trainer: pl.Trainer, most: int) -> list[Any]:
    """Return the first batches that `training_step` would get.

    Raises:
        ValueError: If there is none, or none is asked for.
    """
    batches = list(islice(train_batches(trainer, "max_size_cycle"), most))
    if not batches:
        raise ValueError(
            "bits='auto' estimates from training batches how much each row matters; got "
            f"calibration_batches={most} and no batch. Set calibration_batches to 1 or more, and "
            "give the Trainer training data."
        )
    return batches


class _Loss:
    """A batch's loss: `training_step`'s where it gives one, else the divergence of the outputs."""

    def __init__(self) -> None:
        self.what = "loss of training_step"
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, module: nn.Module, batch: Any) -> tuple[Tensor, int]:
        if self.what.startswith("loss"):
            try:
                return _training_loss(module, batch)
            except Exception as error:  # manual optimization, a step that asks its Trainer, no loss
                self.what = (
                    f"divergence of the outputs (training_step: {type(error).__name__}: {error})"[
                        :160
                    ]
                )
        return output_divergence(_forward(module, batch), self.generator)


def _training_loss(module: nn.Module, batch: Any) -> tuple[Tensor, int]:
    value = module.training_step(batch, 0)  # type: ignore[operator]
    if isinstance(value, Mapping):
        value = value.get("loss")
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise TypeError("returned no loss with a gradient")
    return value, max(_samples(batch), 1)


def _forward(module: nn.Module, batch: Any) -> Any:
    """Return the module's output for a batch's inputs: its first item, or all of its entries."""
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch[0] if isinstance(batch, (tuple, list)) else batch)


def _samples(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch
    if isinstance(items, (str, bytes)) or not hasattr(items, "__iter__"):
        return 0
    return next((n for n in map(_samples, items) if n), 0)


@contextmanager
def _without_log_warnings() -> Iterator[None]:
    """Keep `self.log` on a module without a Trainer from warning at every batch."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*reference is not registered.*")
        yield
