"""The loss that says how much each weight matters: the training step's, or the divergence of the outputs."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.callbacks.road.calibration import Prepared, run_prepared
from clipquant.callbacks.road.parts import samples_of
from clipquant.quant.network.outputs import tensors_of
from clipquant.quant.widths.sensitivity import output_divergence


class Loss:
    """A batch's loss: `training_step`'s where it gives one, else the divergence of the outputs.

    Manual optimization and a step that returns no loss leave the divergence; `what` tells which it was.

    Args:
        what: "loss of training_step", or something else to take the divergence at once.
    """

    def __init__(self, what: str = "loss of training_step") -> None:
        self.what = what
        self.generator = torch.Generator().manual_seed(0)

    def __call__(self, guest: nn.Module, prepared: Prepared) -> tuple[Tensor, int]:
        if self.what.startswith("loss"):
            try:
                return training_loss(guest, prepared.args[0])
            except Exception as error:  # manual optimization, a step that asks its Trainer, no loss
                why = f"training_step: {type(error).__name__}: {error}"
                self.what = f"divergence of the outputs ({why})"[:160]
        return output_divergence(_outputs(guest, prepared), self.generator)


def training_loss(guest: Any, batch: Any) -> tuple[Tensor, int]:
    """Return the loss that `training_step` gives for a batch, and the number of samples.

    Raises:
        TypeError: If it gives none.
    """
    if not guest.automatic_optimization:
        raise TypeError("steps its optimizers itself")
    further = (0,) if len(signature(guest.training_step).parameters) > 1 else ()
    value = guest.training_step(batch, *further)
    if isinstance(value, Mapping):
        value = value.get("loss")
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise TypeError("returned no loss with a gradient")
    return value, max(samples_of(batch), 1)


def _outputs(guest: nn.Module, prepared: Prepared) -> Any:
    """Return what the guest's `forward` gives while its step runs, or else what its last layer does."""
    whole: list[Any] = []
    ends: list[Any] = []

    def see(part: nn.Module, _args: Any, output: Any) -> None:
        tensors = [tensor for tensor in tensors_of(output) if tensor.requires_grad]
        if tensors:
            (whole if part is guest else ends).append(output if part is guest else tensors[0])

    handles = [part.register_forward_hook(see) for part in guest.modules()]
    try:
        returned = run_prepared(guest, prepared)
    finally:
        for handle in handles:
            handle.remove()
    return whole[0] if whole else ends[-1] if ends else returned
