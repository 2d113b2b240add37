"""The range of a layer's inputs while it is trained: seen first, then learned, with codes of 8 bits from 0 to 127."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clipquant.quant.training.fake import FakeQuantize

STEPS = 127  # as int8 files hold activations: sums of two products then fit into 16 bits
_MEMORY = 0.9  # of the ends that batches have had


@dataclass
class LearnedRange:
    """The range of one layer's inputs; while it is only seen, inputs pass as they are.

    Args:
        ends: float32 (2,): a running mean of the least and the greatest input of a batch.
        seen: Batches that it is from.
        scale: The first step; None: not yet.
        stretch: Learned: log of a factor on it.
        shift: Learned: the code of 0.0, rounded on the way forward.

    >>> learned = LearnedRange.new()
    >>> _ = learned.fake(torch.tensor([-1.0, 126.0]))
    >>> learned.begin_(learned.ends)
    >>> learned.fake(torch.tensor([-5.0, 0.4, 3.6, 500.0]))
    tensor([ -1.,   0.,   4., 126.], grad_fn=<FakeQuantizeBackward>)
    """

    ends: Tensor
    seen: int
    scale: Tensor | None
    stretch: Tensor
    shift: Tensor

    @classmethod
    def new(cls, device: torch.device | None = None, learn: bool = True) -> LearnedRange:
        """Return a range that has seen nothing."""
        stretch, shift = (torch.zeros((), device=device, requires_grad=learn) for _ in range(2))
        return cls(torch.zeros(2, device=device), 0, None, stretch, shift)

    def leaves(self) -> Iterator[Tensor]:
        """Yield what is learned."""
        yield from (t for t in (self.stretch, self.shift) if t.requires_grad)

    def fake(self, inputs: Tensor) -> Tensor:
        """Return inputs on the grid of this range, in their own dtype; take note of them until it has begun."""
        if self.scale is None:
            self._see_(inputs)
            return inputs
        zero = self.shift.clamp(0, STEPS)
        zero = zero + (zero.round() - zero).detach()
        found: Tensor = FakeQuantize.apply(inputs, self.scale * self.stretch.exp(), zero, STEPS)  # type: ignore[no-untyped-call]
        return found.to(inputs.dtype)

    def begin_(self, ends: Tensor) -> None:
        """Begin with the range that was seen, 0 included."""
        low, high = (float(end) for end in ends)
        low, high = min(low, 0.0), max(high, 0.0)
        self.scale = torch.tensor((high - low) / STEPS or 1.0, device=self.stretch.device)
        with torch.no_grad():
            self.shift.fill_(-low / float(self.scale))

    def now(self) -> tuple[float, float] | None:
        """Return the ends of the range as it stands; None: it has not begun."""
        if self.scale is None:
            return None
        scale = float(self.scale * self.stretch.detach().exp())
        zero = round(float(self.shift.detach().clamp(0, STEPS)))
        return -zero * scale, (STEPS - zero) * scale

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs to go on from here."""
        return {name: _kept(value) for name, value in vars(self).items()}

    @classmethod
    def from_state_dict(
        cls, state: Mapping[str, Any], learn: bool, device: torch.device
    ) -> LearnedRange:
        """Return the range that `state_dict` was taken of, on a device."""
        made = cls.new(device, learn)
        made.ends, made.seen = state["ends"].to(device), state["seen"]
        made.scale = None if state["scale"] is None else state["scale"].to(device)
        made.stretch.detach().copy_(state["stretch"])
        made.shift.detach().copy_(state["shift"])
        return made

    def _see_(self, inputs: Tensor) -> None:
        if inputs.numel() and inputs.is_floating_point() and torch.is_grad_enabled():
            ends = torch.stack(inputs.detach().float().aminmax())
            if bool(ends.isfinite().all()):
                mixed = _MEMORY * self.ends + (1 - _MEMORY) * ends
                self.ends, self.seen = (mixed if self.seen else ends), self.seen + 1


def _kept(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
