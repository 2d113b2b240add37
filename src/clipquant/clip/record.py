"""What one call of `clip_gradients_` did."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from clipquant.clip.measured import Measured
from clipquant.clip.rule import State


@dataclass(frozen=True)
class ClipRecord:
    """What one call did, and the state for the next call. Its norms are those of that call, whenever they are read.

    Args:
        clipped: Whether any gradient was changed by the rule.
        skipped: Whether the optimizer leaves everything as it is: all gradients were removed, or a GradScaler leaves
            out the step.
        nonfinite: Names (positions where there are none) of the parameters with a NaN or infinite gradient.
        nonzero_share: Share of the elements that `Indicator` set to one; None for other rules.
        deferred: Coefficient that the caller has to apply to all gradients, where it asked for that; norms count it in.
        before: Norms before clipping; None where nobody needed them.
        after: Norms after clipping.
        names: Names of the parameters that had a gradient.
        groups: Index of the parameter group of each of these.
        order: Order of all norms here: that of a `Norm` rule, else 2.
        state: State of the rule after the call, a flat dict of tensors.

    Example:
        >>> import torch
        >>> norms = Measured(torch.tensor([4.0]))
        >>> ClipRecord(clipped=True, before=norms, after=norms.scaled(0.25)).clip_coef
        0.25
    """

    clipped: bool = False
    skipped: bool = False
    nonfinite: tuple[str, ...] = ()
    nonzero_share: float | None = None
    deferred: float | None = None
    before: Measured | None = None
    after: Measured | None = None
    names: tuple[str, ...] = ()
    groups: tuple[int, ...] = ()
    order: float = 2.0
    state: State = field(default_factory=dict)

    @property
    def grad_norm(self) -> float | None:
        """Norm of all gradients before clipping; None where nobody needed it."""
        return None if self.before is None else self.before.total

    @property
    def grad_norm_clipped(self) -> float | None:
        """The same after clipping; 0 for a step that was skipped.

        A `Value` callback leaves this figure of large gradients to whoever reads it in a step that is not logged, and
        it is None once they are gone or have changed.
        """
        if self.skipped:
            return 0.0
        return None if self.after is None or not self.after.known else self.after.total

    @property
    def norms(self) -> Tensor | None:
        """Norm of each gradient before clipping, in the order of `names`; None where not measured."""
        return None if self.before is None else self.before.each

    @property
    def norms_clipped(self) -> Tensor | None:
        """The same after clipping."""
        return None if self.after is None or not self.after.known else self.after.each

    @property
    def clip_coef(self) -> float | None:
        """Share of the norm that clipping left, `grad_norm_clipped / grad_norm`; 1 for a norm of zero."""
        before, after = self.grad_norm, self.grad_norm_clipped
        if before is None or after is None:
            return None
        return after / before if before else 1.0

    def __repr__(self) -> str:
        return (
            f"ClipRecord(grad_norm={self.grad_norm}, grad_norm_clipped={self.grad_norm_clipped}, "
            f"clipped={self.clipped}, skipped={self.skipped}, nonfinite={self.nonfinite})"
        )
