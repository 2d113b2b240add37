"""Quantizing what a checkpoint holds, as its fit's end would have done: no step is trained."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import LightningCLI

from clipquant.callbacks.quantize import QuantizeOnFitEnd
from clipquant.cli.command import CommandError
from clipquant.errors import ClipquantError

_STOPPED = "`Trainer.fit` stopped: `max_steps=0` reached."  # true of every such run, and of no use


@contextmanager
def _unsaid(line: str) -> Iterator[None]:
    """Keep a line of Lightning's from the screen."""

    def keep(record: logging.LogRecord) -> bool:
        return record.getMessage() != line

    packages = ("lightning.pytorch", "pytorch_lightning")  # the one imported last speaks for both
    loggers = [logging.getLogger(f"{package}.utilities.rank_zero") for package in packages]
    for logger in loggers:
        logger.addFilter(keep)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(keep)


class CheckpointTrainer(Trainer):
    """Lightning's Trainer with one more command, which its command line finds by name."""

    def quantize(
        self,
        model: LightningModule,
        train_dataloaders: Any = None,
        val_dataloaders: Any = None,
        datamodule: LightningDataModule | None = None,
        ckpt_path: str | Path | None = None,
    ) -> None:
        """Quantize a trained checkpoint as the configuration's QuantizeOnFitEnd says, without training.

        The fit that wrote the checkpoint is resumed and ends before its next step, so that weights, data,
        budget and report are those of a fit's end.

        Args:
            model: The module that was trained.
            train_dataloaders: Batches to calibrate on, where there is no datamodule.
            val_dataloaders: Batches to judge on, where there is no datamodule.
            datamodule: The data.
            ckpt_path: The checkpoint: a path, or "last".

        Raises:
            CommandError: If there is no checkpoint, no QuantizeOnFitEnd, or nothing was written.
        """
        quantizers = [one for one in self.callbacks if isinstance(one, QuantizeOnFitEnd)]  # type: ignore[attr-defined]
        if not quantizers:
            raise CommandError(
                "quantize needs a QuantizeOnFitEnd among the configuration's trainer.callbacks; got none. "
                "Add it, or call clipquant.quantize(module, bits) in Python."
            )
        if ckpt_path is None:
            raise CommandError("quantize needs the checkpoint: --ckpt_path FILE; got none.")
        if str(ckpt_path) not in ("last", "best", "hpc") and not Path(ckpt_path).is_file():
            raise CommandError(
                f"--ckpt_path must be a checkpoint; there is no file {str(ckpt_path)!r}."
            )
        self.fit_loop.epoch_loop.max_steps = 0
        self.num_sanity_val_steps = 0
        with _unsaid(_STOPPED):
            self.fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path)
        if any(one.artifact_path is None for one in quantizers):
            raise CommandError("nothing was quantized; the warnings above say why.")


class CheckpointCLI(LightningCLI):
    """Lightning's command line with the command `quantize`."""

    def _parse_ckpt_path(self) -> None:
        """Take hyperparameters from a checkpoint that names its class; else the configuration's stand.

        A fit in Python writes its module's arguments without the class, which Lightning's parser refuses.
        """
        with suppress(argparse.ArgumentError):
            super()._parse_ckpt_path()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Return the Trainer; an option that it refuses is the user's to change."""
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError, MisconfigurationException) as error:
            if isinstance(error, ClipquantError):
                raise
            raise CommandError(f"the Trainer refuses its options: {error}") from error

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        of_fit = {"model", "train_dataloaders", "val_dataloaders", "datamodule"}
        return {**LightningCLI.subcommands(), "quantize": of_fit}
