"""One call's gradients and what belongs to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from clipquant.clip.assign import Assignment, Part
from clipquant.clip.gradients import Gradients, writable
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import State
from clipquant.clip.small import are_plain, small_sizes


@dataclass(frozen=True)
class Job:
    """One call's gradients and what belongs to them.

    Args:
        assignment: Parameters and their rules.
        grads: The gradients that there are.
        state: State of all rules.
    """

    assignment: Assignment
    grads: Gradients
    state: State

    @property
    def order(self) -> float:
        """Order of all norms."""
        return self.assignment.order

    def names(self, members: Iterable[int]) -> tuple[str, ...]:
        """Return the names of the parameters of these gradients."""
        names, positions = self.assignment.names, self.grads.positions
        return tuple([names[positions[i]] for i in members])

    def params(self, members: Sequence[int]) -> Sequence[Tensor]:
        """Return the parameters of these gradients."""
        params, positions = self.assignment.params, self.grads.positions
        if len(members) == len(params):
            return params
        return [params[positions[i]] for i in members]

    def parts(self) -> Iterator[tuple[Part, Sequence[int]]]:
        """Yield each part with the indices of its gradients among those present, where there are any."""
        positions = self.grads.positions
        complete = len(positions) == len(self.assignment.params)
        index = None if complete else {position: i for i, position in enumerate(positions)}
        for part in self.assignment.parts:
            members: Sequence[int] = part.members
            if index is not None:
                members = [index[position] for position in members if position in index]
            if members:
                yield part, members

    def record(self, **found: Any) -> ClipRecord:
        """Return the record with the names, and the state where none was found."""
        grads, names = self.grads, self.assignment.names
        if len(grads.positions) < len(names):
            names = self.names(range(len(grads)))
        found.setdefault("state", self.state)
        return ClipRecord(names=names, groups=grads.groups, order=self.order, **found)


def gather_(assignment: Assignment, loss_scale: float, later: bool = False) -> Gradients:
    """Return the gradients that there are, each brought to a form whose stored values can be clipped in place."""
    everything = [param.grad for param in assignment.params]
    if are_plain(everything):
        small = bool(small_sizes(everything))
        return Gradients(
            everything, assignment.groups, assignment.positions, loss_scale, small, later
        )
    tensors: list[Tensor] = []
    present: list[int] = []
    for i, grad in enumerate(everything):
        if grad is None:
            continue
        ready = writable(grad)
        if ready is not grad:
            assignment.params[i].grad = ready
        tensors.append(ready)
        present.append(i)
    groups: Sequence[int] = assignment.groups
    if len(present) < len(groups):
        groups = [groups[i] for i in present]
    small = are_plain(tensors) and bool(small_sizes(tensors))
    return Gradients(tensors, groups, present, loss_scale, small, later)
