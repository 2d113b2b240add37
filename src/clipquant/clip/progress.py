"""What the steps of one optimizer have come to: counts for the log, rule state for the next step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from clipquant.clip.assign import Assignment
from clipquant.clip.measured import Measured
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import State
from clipquant.clip.unread import UnreadRecord

_WAITING = 50  # steps; so late, at most, is known that too many were skipped


@dataclass(frozen=True)
class Skip:
    """A step that was left out.

    Args:
        step: Number of the step.
        grad_norm: Norm of its gradients.
        nonfinite: Names of the parameters with a NaN or infinite gradient; empty where the norm was only too large.
    """

    step: int
    grad_norm: float
    nonfinite: tuple[str, ...]

    def __str__(self) -> str:
        cause = f", NaN or infinite in {', '.join(self.nonfinite[:3])}" if self.nonfinite else ""
        more = f" and {len(self.nonfinite) - 3} more" if len(self.nonfinite) > 3 else ""
        return f"step {self.step}: gradient norm {self.grad_norm:.4g}{cause}{more}"


@dataclass(frozen=True)
class Progress:
    """Counts since the start, and the state of the rules.

    Args:
        steps: Steps that had gradients.
        clipped_steps: Those among them whose gradients were clipped.
        skipped_steps: Those that were left out.
        streak: The skips since the last step that was taken.
        state: State of the rules.
        unread: Latest steps whose figures still stand on an accelerator; they count once they are read.

    Example:
        >>> Progress().after(ClipRecord(clipped=True), step=0).clip_rate
        1.0
    """

    steps: int = 0
    clipped_steps: int = 0
    skipped_steps: int = 0
    streak: tuple[Skip, ...] = ()
    state: State = field(default_factory=dict, repr=False)
    unread: tuple[tuple[int, UnreadRecord], ...] = field(default=(), repr=False)

    @property
    def clip_rate(self) -> float:
        """Share of the steps whose gradients were clipped."""
        return self.clipped_steps / self.steps if self.steps else 0.0

    def after(self, record: ClipRecord, step: int) -> Progress:
        """Return the progress after one more step.

        Args:
            record: What was done to its gradients.
            step: Its number.
        """
        if isinstance(record, UnreadRecord) and not record.was_read:
            waiting = replace(self, state=record.state, unread=(*self.unread, (step, record)))
            return waiting if len(waiting.unread) < _WAITING else waiting.settled()
        streak: tuple[Skip, ...] = ()
        if record.skipped:  # else nobody needs the norm, which may not be measured yet
            norm = record.grad_norm
            skip = Skip(step, math.nan if norm is None else norm, record.nonfinite)
            streak = (*self.streak, skip)
        return replace(
            self,
            steps=self.steps + 1,
            clipped_steps=self.clipped_steps + record.clipped,
            skipped_steps=self.skipped_steps + record.skipped,
            streak=streak,
            state=record.state,
        )

    def settled(self) -> Progress:
        """Return the progress with all steps counted: what is still unread is read, all in one go."""
        if not self.unread:
            return self
        *earlier, (last, record) = self.unread
        known, flags = record.read([each.flags for _, each in earlier])
        counted = replace(self, unread=())
        for (step, each), own in zip(earlier, flags.view(-1, 3).tolist(), strict=True):
            clipped, broken, norm = own
            skipped = bool(broken) and each.skips
            counted = counted.after(
                ClipRecord(
                    clipped=bool(clipped) and not skipped,
                    skipped=skipped,
                    before=Measured(torch.tensor([norm], device="cpu")),
                    state=each.state,
                ),
                step,
            )
        return counted.after(known, last)

    def fitting(self, assignment: Assignment, tell: Callable[[str], object]) -> Progress:
        """Return the same progress without states that rules of this assignment cannot go on from.

        Args:
            assignment: Who clips what from now on.
            tell: Gets a sentence for each state that is dropped.
        """
        state = self.state
        for part in assignment.parts:
            own, needed = part.found(state), part.rule.init().keys()
            if own and not needed <= own.keys():
                where = f"parameter group {part.prefix[5:-1]}" if part.prefix else "the callback"
                tell(
                    f"the state of {where} was written by another rule than {type(part.rule).__name__}: counts go on, "
                    "the state of the rule starts anew"
                )
                dropped = {part.prefix + key for key in own}
                state = {key: value for key, value in state.items() if key not in dropped}
        return replace(self, state=state)

    def state_dict(self) -> dict[str, Any]:
        """Return all as numbers, lists and tensors, which a checkpoint holds without pickled classes."""
        if self.unread:
            return self.settled().state_dict()
        return {
            "steps": self.steps,
            "clipped_steps": self.clipped_steps,
            "skipped_steps": self.skipped_steps,
            "streak": [[skip.step, skip.grad_norm, list(skip.nonfinite)] for skip in self.streak],
            "state": dict(self.state),
        }

    @classmethod
    def from_state_dict(cls, saved: Mapping[str, Any]) -> Progress:
        """Return what `state_dict` was given for."""
        streak = tuple(Skip(step, norm, tuple(names)) for step, norm, names in saved["streak"])
        return cls(
            saved["steps"],
            saved["clipped_steps"],
            saved["skipped_steps"],
            streak,
            dict(saved["state"]),
        )
