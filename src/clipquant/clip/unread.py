"""A record whose figures still stand on an accelerator: reading one waits for it, so that all are read at once."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from clipquant.clip.measured import Measured
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import State


class UnreadRecord(ClipRecord):
    """What one call did, none of which was read: the first figure that somebody asks for brings all of them.

    Args:
        flags: Whether anything was clipped, whether a gradient is not finite, and the norm before: three numbers.
        before: Norm of each gradient before clipping.
        after: The same after; None where not measured.
        skips: Whether the optimizer leaves out the step where a gradient is not finite.
        deferred: Coefficient that the caller has to apply, a scalar tensor; None for none.
        share: Share of the elements that are one, of a rule that writes zeros and ones.
        names: Names of the parameters.
        groups: Index of the parameter group of each.
        order: Order of the norms.
        state: State of the rules.
    """

    def __init__(
        self,
        flags: Tensor,
        before: Tensor,
        after: Tensor | None = None,
        *,
        skips: bool = False,
        deferred: Tensor | None = None,
        share: Tensor | None = None,
        names: tuple[str, ...] = (),
        groups: tuple[int, ...] = (),
        order: float = 2.0,
        state: State | None = None,
    ) -> None:
        own = {"names": names, "groups": groups, "order": order, "state": state or {}}
        vars(self).update(own, flags=flags, skips=skips, coefficient=deferred)
        vars(self).update(_parts=(before, after, share), _host=None)

    flags: Tensor
    skips: bool
    coefficient: Tensor | None
    _parts: tuple[Tensor, Tensor | None, Tensor | None]
    _host: ClipRecord | None

    @property
    def was_read(self) -> bool:
        """Whether the figures were read already."""
        return self._host is not None

    def without_skip(self) -> UnreadRecord:
        """Return the record of a step that is known to be taken."""
        vars(self)["skips"] = False
        return self

    def read(self, more: Sequence[Tensor] = ()) -> tuple[ClipRecord, Tensor]:
        """Return the record with all figures, and the values of other vectors that were read on the way."""
        before, after, share = self._parts
        parts = [self.flags, before, *([] if after is None else [after])]
        parts += [] if share is None else [share.view(1)]
        everything = torch.cat([part.to(self.flags.dtype) for part in (*parts, *more)])
        everything = everything.to("cpu").double()
        counts = [part.numel() for part in parts]
        own, others = everything.split([sum(counts), len(everything) - sum(counts)])
        known = self._host or self._recorded(own, len(before), after is not None)
        vars(self)["_host"] = known
        return known, others

    def _recorded(self, values: Tensor, count: int, measured: bool) -> ClipRecord:
        clipped, broken = bool(values[0]), bool(values[1])
        norms = values[3 : 3 + count]
        before = after = Measured(norms, self.order)
        if measured:
            after = Measured(values[3 + count : 3 + 2 * count], self.order)
        bad = [not math.isfinite(norm) for norm in norms.tolist()] if broken else []
        nonfinite = tuple([name for name, is_bad in zip(self.names, bad, strict=False) if is_bad])
        skipped = broken and self.skips
        share = values[-1].item() if self._parts[2] is not None else None
        return ClipRecord(
            clipped=clipped and not skipped,
            skipped=skipped,
            nonfinite=nonfinite,
            nonzero_share=None if skipped else share,
            before=before,
            after=after if measured and not skipped else None,
            names=self.names,
            groups=self.groups,
            order=self.order,
            state=self.state,
        )

    @property
    def clipped(self) -> bool:
        """Whether any gradient was changed by the rule."""
        return self._known.clipped

    @property
    def skipped(self) -> bool:
        """Whether the optimizer leaves everything as it is."""
        return self._known.skipped

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Names of the parameters with a NaN or infinite gradient."""
        return self._known.nonfinite

    @property
    def nonzero_share(self) -> float | None:
        """Share of the elements that `Indicator` set to one."""
        return self._known.nonzero_share

    @property
    def deferred(self) -> float | None:
        """Coefficient that the caller has to apply to all gradients."""
        return None if self.coefficient is None else float(self.coefficient.to("cpu"))

    @property
    def before(self) -> Measured | None:
        """Norms before clipping."""
        return self._known.before

    @property
    def after(self) -> Measured | None:
        """Norms after clipping."""
        return self._known.after

    @property
    def _known(self) -> ClipRecord:
        return self._host if self._host is not None else self.read()[0]

    def __reduce__(self) -> tuple[object, ...]:
        known = self._known
        return type(known), (), vars(known)
