"""What one call of `clip_gradients_` did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from clipquant.clip.rule import State


@dataclass(frozen=True)
class ClipRecord:
    """What one call did, as plain numbers, and the state for the next call.

    Args:
        grad_norm: Norm of all gradients before clipping; None where nobody needed it.
        grad_norm_clipped: The same after clipping; 0 for a step that was skipped.
        clipped: Whether any gradient was changed by the rule.
        skipped: Whether all gradients were removed, so that the optimizer leaves everything as it is.
        nonfinite: Names (positions where there are none) of the parameters with a NaN or infinite gradient.
        nonzero_share: Share of the elements that `Indicator` set to one; None for other rules.
        deferred: Coefficient that the caller has to apply to all gradients, where it asked for that; norms count it in.
        norms: Norm of each gradient before clipping, in the order of `names`; None where not measured.
        norms_clipped: The same after clipping.
        names: Names of the parameters that had a gradient.
        groups: Index of the parameter group of each of these.
        order: Order of all norms here: that of a `Norm` rule, else 2.
        state: State of the rule after the call, a flat dict of tensors.

    Example:
        >>> ClipRecord(grad_norm=4.0, grad_norm_clipped=1.0, clipped=True).clip_coef
        0.25
    """

    grad_norm: float | None = None
    grad_norm_clipped: float | None = None
    clipped: bool = False
    skipped: bool = False
    nonfinite: tuple[str, ...] = ()
    nonzero_share: float | None = None
    deferred: float | None = field(default=None, repr=False)
    norms: Tensor | None = field(default=None, repr=False)
    norms_clipped: Tensor | None = field(default=None, repr=False)
    names: tuple[str, ...] = field(default=(), repr=False)
    groups: tuple[int, ...] = field(default=(), repr=False)
    order: float = field(default=2.0, repr=False)
    state: State = field(default_factory=dict, repr=False)

    @property
    def clip_coef(self) -> float | None:
        """Share of the norm that clipping left, `grad_norm_clipped / grad_norm`; 1 for a norm of zero."""
        if self.grad_norm is None or self.grad_norm_clipped is None:
            return None
        return self.grad_norm_clipped / self.grad_norm if self.grad_norm else 1.0
