"""Non-finite gradients: find them exactly, set them to zero."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.shards import local_values
from clipquant.errors import ArgumentError, ClipquantError

OnNonfinite = Literal["skip", "zero", "raise", "propagate"]
POLICIES: tuple[OnNonfinite, ...] = ("skip", "zero", "raise", "propagate")


class NonfiniteError(ClipquantError, FloatingPointError):
    """A gradient that is not finite, where the user asked to be told by an error."""


def check_policy(on_nonfinite: str) -> OnNonfinite:
    """Return `on_nonfinite` if it names a policy.

    Raises:
        ValueError: It does not.
    """
    for policy in POLICIES:
        if on_nonfinite == policy:
            return policy
    raise ArgumentError(
        f"on_nonfinite must be one of {', '.join(map(repr, POLICIES))}, got {on_nonfinite!r}: "
        'choose "skip" to leave out a step with NaN or infinite gradients, or "propagate" to let them through'
    )


def nonfinite_members(gradients: Gradients, order: float = 2.0) -> tuple[int, ...]:
    """Return the indices of the gradients that hold a NaN or an infinity.

    A norm is finite exactly where all elements are, because no norm of a finite tensor overflows here; so the pass
    that measures the norms is the pass that finds the damage.

    Args:
        gradients: The gradients of one step.
        order: Order of the norm to read; norms measured before are not measured again. Below 1 a sum of many roots
            may overflow, so that order 2 is read instead.

    Returns:
        Indices in ascending order; empty where every element is finite.

    Example:
        >>> nonfinite_members(Gradients([torch.ones(2), torch.tensor([1.0, float("nan")])]))
        (1,)
    """
    order = order if order >= 1 else 2.0
    if math.isfinite(gradients.measured(order).total):
        return ()
    return tuple(
        i for i, norm in enumerate(gradients.norms(order).tolist()) if not math.isfinite(norm)
    )


def zero_nonfinite_(gradient: Tensor) -> Tensor:
    """Set every NaN and infinite element of `gradient` to zero, in place; finite elements stay bit for bit.

    Args:
        gradient: A gradient of any layout.

    Returns:
        The same tensor.

    Example:
        >>> zero_nonfinite_(torch.tensor([1.0, float("inf"), float("nan")]))
        tensor([1., 0., 0.])
    """
    values = local_values(gradient)
    if values.is_complex():
        values.masked_fill_(~torch.isfinite(values), 0)
    else:
        torch.nan_to_num_(values, nan=0.0, posinf=0.0, neginf=0.0)
    return gradient


def told(names: Sequence[str]) -> str:
    """Return what to say about parameters whose gradients are not finite, by their names."""
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return (
        f"NaN or infinite gradients in {shown}: find the cause with torch.autograd.set_detect_anomaly(True), "
        'or set on_nonfinite="skip" to leave out such steps'
    )
