"""What a training with fake quantization hands over to QuantizeOnFitEnd: its grids, and the weights on them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch

from clipquant.callbacks.failures import Failure
from clipquant.callbacks.qat import QuantizationAwareTraining
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.network.bare import bare_key
from clipquant.quant.training.learned_grid import LearnedGrid
from clipquant.quant.training.running import hold_trained_

SAID = "no batch: codes and grids are those of the training"


def finish_training(
    trainer: pl.Trainer, module: pl.LightningModule
) -> tuple[Mapping[str, TrainedGrid], Mapping[str, float]]:
    """End whatever trains weights in another form; return the grids that were trained, none where nobody did.

    Beside them the metrics of the float network, where bits were chosen by them during the fit.

    Args:
        trainer: The Trainer whose fit has ended.
        module: Its module, which holds the values that were trained afterwards.
    """
    trained: dict[str, TrainedGrid] = {}
    before: dict[str, float] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        finish = getattr(callback, "finish", None)
        if callable(finish) and hasattr(callback, "pruned_names_in"):
            finish(module)  # masks first: what is pruned is zero before it is put on a grid
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, QuantizationAwareTraining):
            grids = callback.finish(module)
            trained.update({bare_key(name): grid for name, grid in grids.items()})
            before.update(callback.float_metrics)
    return trained, before


def take_from_checkpoint_(
    module: pl.LightningModule, checkpoint: Mapping[str, Any]
) -> Mapping[str, TrainedGrid]:
    """Give a module that holds a checkpoint's weights the values that were trained; return their grids.

    Args:
        module: Holds the checkpoint's weights.
        checkpoint: As Lightning writes it; one from before the training was quantized has no grids.
    """
    trained: dict[str, TrainedGrid] = {}
    for state in checkpoint.get("callbacks", {}).values():
        grids = state.get("grids") if isinstance(state, Mapping) else None
        for name, grid in (grids or {}).items():
            trained[name] = LearnedGrid.from_state_dict(grid, False, torch.device("cpu")).now()
    hold_trained_(module, trained)
    return trained


def no_grids(method: object) -> Failure:
    """Return what is told where the best checkpoint is of before the training was quantized."""
    return Failure(
        "taking over trained grids",
        "the best checkpoint was written before the training was quantized",
        f"its float weights are quantized by method={method!r}",
        "Use weights='last', or start=0 in QuantizationAwareTraining.",
    )
