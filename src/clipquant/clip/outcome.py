"""What carrying out a plan came to."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipquant.clip.gradients import Gradients
from clipquant.clip.measured import Measured
from clipquant.clip.shards import any_distributed, reduce_any, reduce_norms, reduce_together


@dataclass(frozen=True)
class Outcome:
    """What carrying out a plan came to.

    Args:
        clipped: Whether any gradient was changed.
        finite: False where a gradient was found not to be finite, and left as it was.
        before: Norms before, where asked for.
        after: Norms after; `before` itself where nothing was changed.
        nonzero_share: Share of the elements that are one, of a plan that writes zeros and ones.
    """

    clipped: bool
    finite: bool = True
    before: Measured | None = None
    after: Measured | None = None
    nonzero_share: float | None = None

    def unmeasured(self) -> Outcome:
        """Return the outcome without norms, for who did not ask for them."""
        return replace(self, before=None, after=None)

    def on_all_processes(self, grads: Gradients, order: float | None) -> Outcome:
        """Return the outcome on all processes, its norms without the factor that the gradients still carry.

        Args:
            grads: What the outcome on this process is about.
            order: Order of its norms.
        """
        if grads.loss_scale == 1.0 and not any_distributed(grads.tensors):
            return self
        together = self._together(grads, order or 2.0)
        if together is not None:
            return together
        clipped, broken = reduce_any([self.clipped, not self.finite], grads)
        before = after = _whole(self.before, grads, order)
        if clipped:  # on any process: all of them have to ask
            after = _whole(self.after, grads, order)
        return replace(self, clipped=clipped, finite=not broken, before=before, after=after)

    def _together(self, grads: Gradients, order: float) -> Outcome | None:
        """Return the outcome on all processes by one collective, where one is enough."""
        flags = [self.clipped, not self.finite]
        norms = [each for each in (self.before, self.after) if each is not None]
        reduced = reduce_together(flags, [n.each for n in norms], grads.tensors, order)
        if reduced is None:
            return None
        (clipped, broken), wholes = reduced
        found = [Measured(whole, order, factor=1.0 / grads.loss_scale) for whole in wholes]
        before, after = found or (None, None)
        return replace(
            self,
            clipped=clipped,
            finite=not broken,
            before=before,
            after=after if clipped else before,
        )


def _whole(norms: Measured | None, grads: Gradients, order: float | None) -> Measured | None:
    if norms is None:
        return None
    order = order or 2.0
    whole = reduce_norms(norms.each, grads.tensors, order)
    return Measured(whole, order, factor=1.0 / grads.loss_scale)
