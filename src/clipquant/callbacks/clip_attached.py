"""What GradientClipCallback hangs on one optimizer while it clips for it."""

from __future__ import annotations

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clipquant.callbacks.clip_evaluations import Evaluations
from clipquant.callbacks.clip_targets import Targets
from clipquant.clip.fold import fold_, skip_where_, unfold_after_step
from clipquant.clip.record import ClipRecord
from clipquant.clip.unread import UnreadRecord


class Attached:
    """One optimizer with who clips its parameters, its evaluations, and the hook that ends a folded step.

    Args:
        targets: Which of its parameters are clipped, and by which rule.
        skips: Whether steps may be skipped, so that an optimizer of several evaluations has to be watched.
    """

    def __init__(self, targets: Targets, skips: bool) -> None:
        self.targets = targets
        self.optimizer: Optimizer = targets.optimizer
        self.evaluations = Evaluations.of(self.optimizer) if skips else None
        self._handle: RemovableHandle | None = None

    @property
    def skipping(self) -> bool:
        """Whether the step under way is left out, so that its further evaluations do not count."""
        return self.evaluations is not None and self.evaluations.skipping

    def begin(self) -> None:
        """Keep what a skip would have to put back."""
        if self.evaluations is not None:
            self.evaluations.begin()

    def end(self, record: ClipRecord, device: torch.device) -> None:
        """Hand the coefficient that is left over to the optimizer's step, and have a skip undone after it."""
        if isinstance(record, UnreadRecord):
            self._end_unread(record, device)
        elif record.deferred is not None and record.deferred < 1.0:
            fold_(self.optimizer, record.deferred, device)
            self._unfold_later()
        if self.evaluations is not None:
            self.evaluations.skipping = record.skipped

    def _end_unread(self, record: UnreadRecord, device: torch.device) -> None:
        """Have the step multiply and skip by what stands on the device, none of which is known here."""
        if record.coefficient is not None:
            fold_(self.optimizer, record.coefficient, device)
        if record.skips:
            skip_where_(self.optimizer, record.flags[1])
        if record.coefficient is not None or record.skips:
            self._unfold_later()

    def _unfold_later(self) -> None:
        if self._handle is None:
            self._handle = unfold_after_step(self.optimizer)

    def remove(self) -> None:
        """Take all hooks off the optimizer."""
        if self._handle is not None:
            self._handle.remove()
        if self.evaluations is not None:
            self.evaluations.remove()
