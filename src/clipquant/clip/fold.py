"""Clipping inside the optimizer's step: fused optimizers divide the gradients by `grad_scale` as they read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer
from torch.optim.optimizer import _global_optimizer_pre_hooks
from torch.utils.hooks import RemovableHandle

_DIVIDES_BY_GRAD_SCALE = (
    SGD,
    Adagrad,
    Adam,
    AdamW,
)  # not their subclasses, whose step may be another
OWN_FLAG = "_clipquant_found_inf"  # tells a flag set here from one of a GradScaler
_STEPS: dict[type, Any] = {kind: kind.step for kind in _DIVIDES_BY_GRAD_SCALE}


def can_fold(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's own step can scale all of its gradients.

    Args:
        optimizer: Any optimizer.

    Returns:
        True for a fused optimizer of torch, all of whose groups are fused, over plain dense tensors, whose `step` is
        torch's own: not compiled, not wrapped, and without hooks that would see the gradients first.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> can_fold(AdamW([weight], fused=True)), can_fold(AdamW([weight]))
        (True, False)
    """
    if type(optimizer) not in _DIVIDES_BY_GRAD_SCALE or not supports_scaling(optimizer):
        return False
    if not _steps_as_torch_does(optimizer):
        return False
    groups = optimizer.param_groups
    return all(
        group.get("fused") and not any(isinstance(p, DTensor) for p in group["params"])
        for group in groups
    )


def supports_scaling(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's step takes scaled gradients; it writes all gradients back then."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def _steps_as_torch_does(optimizer: Optimizer) -> bool:
    """Return whether calling `optimizer.step` runs torch's code and nothing before it."""
    own: Any = type(optimizer).step
    known = _STEPS[type(optimizer)]
    if own is not known and not (
        getattr(own, "hooked", False) and getattr(own, "__wrapped__", None) is known
    ):
        return False
    step = vars(optimizer).get("step")
    by_scheduler = getattr(step, "_wrapped_by_lr_sched", False)  # counts the step, then runs it
    if step is not None and not (by_scheduler and step.__wrapped__ is own):
        return False
    return not optimizer._optimizer_step_pre_hooks and not _global_optimizer_pre_hooks


def can_skip(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's own step leaves out everything where `found_inf` says so, on its device.

    A fused SGD whose momentum does not exist yet would begin with a buffer that holds anything.
    """
    if not can_fold(optimizer):
        return False
    if not isinstance(optimizer, SGD):
        return True
    groups = optimizer.param_groups
    return all(
        optimizer.state.get(p, {}).get("momentum_buffer") is not None
        for group in groups
        for p in group["params"]
        if group["momentum"] and p.grad is not None
    )


def skip_where_(optimizer: Optimizer, broken: Tensor) -> None:
    """Let the next step of a fused optimizer change nothing where `broken`, a scalar tensor, is 1."""
    found = broken.detach().float()
    for name in ("found_inf", OWN_FLAG):  # torch documents the first but does not declare it
        setattr(optimizer, name, found)


def fold_(optimizer: Optimizer, coefficient: float | Tensor, device: torch.device) -> None:
    """Let the next step of a fused optimizer multiply its gradients by `coefficient`; it writes them back multiplied.

    Args:
        optimizer: One that `can_fold`.
        coefficient: Factor in [0, 1]; a number must be greater than 0, of a tensor 0 counts as the smallest number.
        device: Device of the gradients.
    """
    if isinstance(coefficient, Tensor):
        scale = coefficient.detach().reciprocal().clamp(1.0, 1e30).float()
    else:
        scale = torch.full((), 1.0 / coefficient, dtype=torch.float64, device="cpu").float()
        scale = scale.clamp_(min=1.0)
    setattr(optimizer, "grad_scale", scale.to(device))  # noqa: B010 - torch documents the attribute but does not declare it


def unfold_(optimizer: Optimizer) -> None:
    """Remove what `fold_` and `skip_where_` left, so that no later step follows it."""
    optimizer.__dict__.pop("grad_scale", None)
    if optimizer.__dict__.pop(OWN_FLAG, None) is not None:
        optimizer.__dict__.pop("found_inf", None)


def unfold_after_step(optimizer: Optimizer) -> RemovableHandle:
    """Make every step of the optimizer end with `unfold_`; return the handle that undoes this.

    A `GradScaler` brings a `found_inf` of its own beside `grad_scale` and removes both: its steps are left alone.
    """

    def remove(stepped: Optimizer, *_: Any) -> None:
        found = getattr(stepped, "found_inf", None)
        if not isinstance(found, Tensor) or found is getattr(stepped, OWN_FLAG, None):
            unfold_(stepped)

    return optimizer.register_step_post_hook(remove)
