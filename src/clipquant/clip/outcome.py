"""What carrying out a plan came to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from clipquant.clip.gradients import Gradients
from clipquant.clip.shards import reduce_any, reduce_norms


@dataclass(frozen=True)
class Outcome:
    """What carrying out a plan came to.

    Args:
        clipped: Whether any gradient was changed.
        finite: False where a gradient was found not to be finite, and left as it was.
        before: Norm of each gradient before, where asked for.
        after: Norm of each gradient after.
        nonzero_share: Share of the elements that are one, of a plan that writes zeros and ones.
    """

    clipped: bool
    finite: bool = True
    before: Tensor | None = None
    after: Tensor | None = None
    nonzero_share: float | None = None

    def on_all_processes(self, grads: Gradients, order: float | None) -> Outcome:
        """Return the outcome on all processes, its norms without the factor that the gradients still carry.

        Args:
            grads: What the outcome on this process is about.
            order: Order of its norms.
        """
        clipped, broken = reduce_any([self.clipped, not self.finite], grads)
        before, after = (
            None if n is None else reduce_norms(n, grads.tensors, order or 2.0) / grads.loss_scale
            for n in (self.before, self.after)
        )
        return replace(self, clipped=clipped, finite=not broken, before=before, after=after)
