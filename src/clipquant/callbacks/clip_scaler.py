"""Gradients under a GradScaler: who unscales them, and which factor they still carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.amp.grad_scaler import OptState
from torch.optim import Optimizer

from clipquant.clip.fold import supports_scaling


class Unscaling:
    """What the gradients of each optimizer still carry, and what this object has unscaled itself."""

    def __init__(self) -> None:
        self._unscaled: dict[int, Any] = {}

    def factor(self, scaler: torch.amp.GradScaler, optimizer: Optimizer, fold: bool) -> float:
        """Return the factor that the gradients carry, having unscaled those that nobody else will before the step.

        Lightning leaves the gradients of fused optimizers to their step, and those of a `training_step` that returned
        None as they are.

        Args:
            scaler: The scaler in use.
            optimizer: The optimizer whose step may follow.
            fold: Whether the optimizer's own step will apply the clipping, and needs the gradients scaled.
        """
        if not supports_scaling(optimizer):
            return 1.0 if _is_unscaled(scaler, optimizer) else float(scaler.get_scale())
        if fold:
            return float(scaler.get_scale())
        states = scaler._per_optimizer_states
        if self._unscaled.get(id(optimizer)) is states.get(id(optimizer), states):
            del states[id(optimizer)]  # no step followed the last time, and these gradients are new
        if not _is_unscaled(scaler, optimizer):
            scaler.unscale_(optimizer)
            self._unscaled[id(optimizer)] = states[id(optimizer)]
        return 1.0


@contextmanager
def divided(params: Iterable[Tensor], factor: float) -> Iterator[None]:
    """Divide the gradients by a factor, a power of two, while they are clipped, and multiply what is left by it."""
    params = list(params)
    for param in params:
        if param.grad is not None:
            param.grad.div_(factor)
    try:
        yield
    finally:
        for param in params:
            if param.grad is not None:
                param.grad.mul_(factor)


def _is_unscaled(scaler: torch.amp.GradScaler, optimizer: Optimizer) -> bool:
    state = scaler._per_optimizer_states.get(id(optimizer))
    return state is not None and state["stage"] is not OptState.READY


def scaler_of(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler in use, if any."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None
