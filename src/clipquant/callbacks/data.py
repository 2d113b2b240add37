"""The Trainer's own data, asked anew: every process's samples, and random states left as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import CombinedLoader, move_data_to_device
from lightning.pytorch.utilities.model_helpers import is_overridden
from lightning.pytorch.utilities.seed import isolate_rng

from clipquant.quant.network.calibration import calibration_data


def validation_data(trainer: pl.Trainer, module: pl.LightningModule) -> Any:
    """Return the validation dataloaders asked anew; None where there are none, or no step to run."""
    if not is_overridden("validation_step", module, pl.LightningModule):
        return None
    if trainer.limit_val_batches == 0:
        return None
    return dataloaders(trainer, "val")


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
def kept_generators(loaders: Any) -> Iterator[None]:
    """Leave the random generators that dataloaders carry as they were."""
    flat = CombinedLoader(loaders, "sequential").flattened
    held = [getattr(part, "generator", None) for part in flat]
    held += [getattr(getattr(part, "sampler", None), "generator", None) for part in flat]
    states = [(g, g.get_state()) for g in held if isinstance(g, torch.Generator)]
    try:
        yield
    finally:
        for generator, state in states:
            generator.set_state(state)


def train_batches(
    trainer: pl.Trainer, mode: Literal["sequential", "max_size_cycle"] = "sequential"
) -> Iterator[Any]:
    """Yield batches of the train data, or of the validation data where there are none, on the CPU.

    Args:
        trainer: The Trainer that has fitted.
        mode: Of `CombinedLoader`, where there are several dataloaders: "sequential" gives batches
            of each, "max_size_cycle" what `training_step` gets.
    """
    for stage in ("train", "val"):
        loaders = dataloaders(trainer, stage)
        if loaders is not None:
            for batch, _, _ in iter(CombinedLoader(loaders, mode)):
                yield move_data_to_device(batch, "cpu")
            return


def calibration_batches(trainer: pl.Trainer, count: int, seed: int = 0) -> list[Any]:
    """Return the first `count` train batches, the same for the same seed; random state is left as it was.

    Args:
        trainer: The Trainer that has fitted.
        count: How many; 0: none.
        seed: Of shuffling and of the train transforms.

    Raises:
        ValueError: If the data are empty.
        RuntimeError: If the loader raises, naming the batch.
    """
    if count == 0:
        return []
    with isolate_rng():
        torch.manual_seed(seed)
        return calibration_data(train_batches(trainer), count)
