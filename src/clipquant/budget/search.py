"""The smallest drop for a size, or the smallest size for a drop, judged by the user's own metric."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.budget.bisection import MAX_TRIALS, smallest_that_holds
from clipquant.budget.chance import Drop, Judged, drop_between
from clipquant.budget.goal import BudgetError, Goal, refuse_below
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.widths.allocator import Allocator
from clipquant.report.digits import measured
from clipquant.report.record import Budget, Trial

_SIZES = 400  # that a search for the smallest size chooses from: 9 bisections
_CURVE = (0.8, 0.6)  # shares of a size budget that are measured too, to show what less would cost
_CLOSE, _TURNS = (
    500,
    5,
)  # expected bytes fill a file where less than a 500th is left, or after so many turns
_BEYOND = (
    0.95  # how sure it must be that another allocation is better than the one that fills the budget
)


@dataclass(frozen=True)
class Allocation:
    """The weights chosen, their widths, what was judged of them, and the search that led to them."""

    weights: QuantizedWeights
    bits: Mapping[str, Tensor]
    judged: Judged
    budget: Budget
    drop: Drop | None = None


def meet(
    goal: Goal,
    allocator: Allocator,
    size_of: Callable[[QuantizedWeights], int],
    before: Judged,
    judge: Callable[[QuantizedWeights], Judged] | None,
    spare: int = 0,
) -> Allocation:
    """Return the weights that meet a goal, or come nearest to it, with the search that found them.

    With `max_size` alone the budget is filled, by rows unless one width for all is better beyond chance; with
    `max_drop` alone the smallest file that was measured to hold is returned; with both, the fullest file that
    fits is, if it holds, and else the smallest larger one that does.

    `max_drop` is about the true drop, of which the one measured is a sample: it holds where the drop and one
    standard error, or as many as make it as sure as asked, are within it. Where a metric has no parts, and so
    no standard error is known, the drop measured decides, and the budget says so.

    Args:
        goal: What is asked for.
        allocator: The weights on grids of every width.
        size_of: Bytes of the file that holds some weights.
        before: What was judged of the float model.
        judge: Judges the model with some weights. None: sizes alone can be met.
        spare: Bytes to leave for what the file will say of the search itself.

    Raises:
        BudgetError: If the metric was not logged or is NaN, or no file is as small as `max_size`.
    """
    return _Search(goal, allocator, size_of, before, judge, spare).run()


class _Search:
    """One search: what it was asked, and the trials so far."""

    def __init__(
        self,
        goal: Goal,
        allocator: Allocator,
        size_of: Callable[[QuantizedWeights], int],
        before: Judged,
        judge: Callable[[QuantizedWeights], Judged] | None,
        spare: int,
    ) -> None:
        self.goal, self.allocator, self.size_of, self.judge = goal, allocator, size_of, judge
        self.spare = spare
        _check_monitored(before, goal, judge is not None)
        self.before = before
        self.tried: list[tuple[Allocation, Trial]] = []
        edge = allocator.frontier
        least = allocator.weights(edge.fill(edge.least_bytes))
        self.smallest = size_of(least) + spare
        self.overhead = self.smallest - edge.least_bytes

    def run(self) -> Allocation:
        """Search as the goal says, and mark what is chosen."""
        goal = self.goal
        if goal.max_size is not None:
            refuse_below(goal.max_size, self.smallest)
        if goal.max_drop is None:
            return self._chosen(self._fill(), "")
        if goal.max_size is not None:
            full = self._try(self._bits(goal.max_size))
            if self._holds(full):
                return self._chosen(full, "")
        return self._least()

    def _fill(self) -> int:
        """Return what fills the size by rows; one width for all, where that is better beyond chance."""
        limit = self.goal.max_size or 0
        best = self._try(self._bits(limit))
        if self.judge is None:
            return best
        fits = [w for w in range(1, 9) if self._uniform_size(w) <= limit]
        if fits:
            other = self._try(self.allocator.uniform(fits[-1]), "uniform")
            if self._is_better(other, best):
                best = other
        for share in _CURVE:
            if share * limit > self.smallest:
                self._try(self._bits(int(share * limit)))
        return best

    def _is_better(self, other: int, best: int) -> bool:
        """Return whether an allocation's metric is better than another's by more than chance explains."""
        goal, held = self.goal, self.tried[best][0].judged
        if goal.monitor not in held.metrics:
            return False
        loss = drop_between(held, self.tried[other][0].judged, goal.monitor, goal.mode)
        return loss.error is not None and loss.value < 0 and loss.holds(0.0, _BEYOND)

    def _least(self) -> Allocation:
        """Return the smallest allocation measured to hold; without one, the nearest."""
        goal, edge = self.goal, self.allocator.frontier
        first = max(edge.least_bytes, (goal.max_size or 0) - self.overhead, edge.most_bytes // 40)
        points = torch.logspace(
            math.log(max(first, 1)), math.log(max(edge.most_bytes, 2)), _SIZES, math.e
        )
        sizes = sorted({min(int(point) + 1, edge.most_bytes) for point in points.double().tolist()})
        at: dict[int, int] = {}

        def holds(code_bytes: int) -> bool:
            at[code_bytes] = self._try(edge.fill(code_bytes))
            return self._holds(at[code_bytes])

        smallest = smallest_that_holds(holds, sizes, MAX_TRIALS - len(self.tried))
        if smallest is None:
            nearest = min(range(len(self.tried)), key=lambda index: self._drop(index).value)
            drop = self._drop(nearest)
            said = f"no allocation keeps the drop of {goal.monitor} within {goal.max_drop:g}"
            if drop.value <= (goal.max_drop or 0.0) and goal.confidence is not None:
                said += f", {100 * goal.confidence:g} % sure"
            return self._chosen(nearest, f"{said}; the least is {measured(drop.value, drop.error)}")
        return self._chosen(at[smallest], "")

    def _bits(self, file_bytes: int) -> dict[str, Tensor]:
        """Return the allocation that fills a file of at most so many bytes.

        Where the bytes of codes are expected ones, as those of an entropy code, what is left is given out anew.
        """
        room, edge = file_bytes - self.overhead, self.allocator.frontier
        found: dict[str, Tensor] | None = None
        for turn in itertools.count():
            bits = edge.fill(max(room, edge.least_bytes))
            over = self.size_of(self.allocator.weights(bits)) + self.spare - file_bytes
            fits = over <= 0 or room <= edge.least_bytes
            full = not edge.estimated or -over * _CLOSE <= file_bytes or room >= edge.most_bytes
            found = bits if fits else found
            if found is not None and ((fits and full) or turn >= _TURNS):
                break
            room -= over
        return found or {}

    def _uniform_size(self, width: int) -> int:
        choices = self.allocator.frontier.choices
        bits = self.allocator.uniform(width)
        return self.overhead + sum(c.code_bytes(bits[n]) for n, c in choices.items())

    def _try(self, bits: Mapping[str, Tensor], what: str = "rows") -> int:
        """Measure an allocation; return its index."""
        weights = self.allocator.settled(self.allocator.weights(bits))
        judged = Judged({}) if self.judge is None else self.judge(weights)
        drop = Drop(math.inf)
        if self.goal.monitor in judged.metrics and self.goal.monitor in self.before.metrics:
            drop = drop_between(self.before, judged, self.goal.monitor, self.goal.mode)
        value = judged.metrics.get(self.goal.monitor)
        trial = Trial(self.size_of(weights), value, what, error=drop.shown_error)
        self.tried.append((Allocation(weights, bits, judged, Budget(), drop), trial))
        return len(self.tried) - 1

    def _drop(self, index: int) -> Drop:
        drop = self.tried[index][0].drop or Drop(math.inf)
        return Drop(math.inf) if math.isnan(drop.value) else drop

    def _holds(self, index: int) -> bool:
        return self._drop(index).holds(self.goal.max_drop or 0.0, self.goal.confidence)

    def _chosen(self, index: int, failure: str) -> Allocation:
        trials = tuple(
            replace(trial, chosen=number == index) for number, (_, trial) in enumerate(self.tried)
        )
        goal, chosen, drop = self.goal, self.tried[index][0], self._drop(index)
        sure, unsure = None, ""
        if goal.max_drop is not None:
            sure = drop.sure(goal.max_drop)
            sure = None if sure is None else float(f"{sure:.4g}")
            if drop.error is None:
                why = (
                    chosen.judged.whole_only or self.before.whole_only or "validation has one batch"
                )
                unsure = f"the drop has no standard error ({why})"
        budget = Budget(
            goal.max_drop, goal.max_size, trials, failure, goal.confidence, sure, unsure
        )
        return replace(chosen, budget=budget)


def _check_monitored(before: Judged, goal: Goal, judged: bool) -> None:
    """Raise where a drop is asked for and cannot be judged."""
    if goal.max_drop is None:
        return
    value = before.metrics.get(goal.monitor)
    if not judged or not before.metrics:
        raise BudgetError(
            "max_drop is judged on validation data, and there is none. Give the Trainer validation "
            "data (quantize(): a score), or ask for max_size alone."
        )
    if value is None:
        raise BudgetError(
            f"max_drop watches {goal.monitor!r}, which was never logged in validation; logged were "
            f"{', '.join(sorted(before.metrics)) or 'none'}. Set monitor to one of them."
        )
    if math.isnan(value):
        raise BudgetError(
            f"the float model's {goal.monitor} is NaN, so no drop can be told. Mend the metric or the training."
        )
