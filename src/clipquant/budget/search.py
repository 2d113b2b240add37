"""The smallest drop for a size, or the smallest size for a drop, judged by the user's own metric."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clipquant.budget.bisection import MAX_TRIALS, smallest_that_holds
from clipquant.budget.goal import BudgetError, Goal, Metrics, refuse_below
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.widths.allocator import Allocator
from clipquant.report.record import Budget, Trial, drop_of

_SIZES = 400  # that a search for the smallest size chooses from: 9 bisections
_CURVE = (0.8, 0.6)  # shares of a size budget that are measured too, to show what less would cost


@dataclass(frozen=True)
class Allocation:
    """The weights chosen, their widths and metrics, and the search that led to them."""

    weights: QuantizedWeights
    bits: Mapping[str, Tensor]
    metrics: Metrics
    budget: Budget


def meet(
    goal: Goal,
    allocator: Allocator,
    size_of: Callable[[QuantizedWeights], int],
    before: Metrics,
    judge: Callable[[QuantizedWeights], Metrics] | None,
    spare: int = 0,
) -> Allocation:
    """Return the weights that meet a goal, or come nearest to it, with the search that found them.

    With `max_size` alone the budget is filled; with `max_drop` alone the smallest file that was
    measured to hold is returned; with both, the fullest file that fits is, if it holds, and else the
    smallest larger one that does.

    Args:
        goal: What is asked for.
        allocator: The weights on grids of every width.
        size_of: Bytes of the file that holds some weights.
        before: Metrics of the float model.
        judge: Metrics of the model with some weights. None: sizes alone can be met.
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
        before: Metrics,
        judge: Callable[[QuantizedWeights], Metrics] | None,
        spare: int,
    ) -> None:
        self.goal, self.allocator, self.size_of, self.judge = goal, allocator, size_of, judge
        self.spare = spare
        self.before = _monitored(before, goal, judge is not None)
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
        """Return the best of what fits the size: by rows, or one width where that measured better."""
        limit = self.goal.max_size or 0
        best = self._try(self._bits(limit))
        if self.judge is None:
            return best
        fits = [w for w in range(1, 9) if self._uniform_size(w) <= limit]
        if fits:
            other = self._try(self.allocator.uniform(fits[-1]), "uniform")
            if self._drop(other) < self._drop(best):
                best = other
        for share in _CURVE:
            if share * limit > self.smallest:
                self._try(self._bits(int(share * limit)))
        return best

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
            nearest = min(range(len(self.tried)), key=self._drop)
            said = f"no allocation keeps the drop of {goal.monitor} within {goal.max_drop:g}; the least is"
            return self._chosen(nearest, f"{said} {self._drop(nearest):.4g}")
        return self._chosen(at[smallest], "")

    def _bits(self, file_bytes: int) -> dict[str, Tensor]:
        """Return the allocation that fills a file of at most so many bytes."""
        room, edge = file_bytes - self.overhead, self.allocator.frontier
        while True:
            bits = edge.fill(max(room, edge.least_bytes))
            over = self.size_of(self.allocator.weights(bits)) + self.spare - file_bytes
            if over <= 0 or room <= edge.least_bytes:
                return bits
            room -= over

    def _uniform_size(self, width: int) -> int:
        choices = self.allocator.frontier.choices
        bits = self.allocator.uniform(width)
        rows = sum(
            c.row_bytes(int(bits[n][0])) * len(c.losses) for n, c in choices.items() if len(bits[n])
        )
        return self.overhead + rows

    def _try(self, bits: Mapping[str, Tensor], what: str = "rows") -> int:
        """Measure an allocation; return its index."""
        weights = self.allocator.settled(self.allocator.weights(bits))
        metrics = {} if self.judge is None else self.judge(weights)
        trial = Trial(self.size_of(weights), metrics.get(self.goal.monitor), what)
        self.tried.append((Allocation(weights, bits, metrics, Budget()), trial))
        return len(self.tried) - 1

    def _drop(self, index: int) -> float:
        value = self.tried[index][1].value
        if value is None or self.before is None or math.isnan(value):
            return math.inf
        return drop_of(self.before, value, self.goal.mode)

    def _holds(self, index: int) -> bool:
        return self._drop(index) <= (self.goal.max_drop or 0.0) + 1e-9

    def _chosen(self, index: int, failure: str) -> Allocation:
        trials = tuple(
            replace(trial, chosen=number == index) for number, (_, trial) in enumerate(self.tried)
        )
        budget = Budget(self.goal.max_drop, self.goal.max_size, trials, failure)
        return replace(self.tried[index][0], budget=budget)


def _monitored(before: Metrics, goal: Goal, judged: bool) -> float | None:
    """Return the float model's metric, or raise where a drop is asked for and cannot be judged."""
    value = before.get(goal.monitor)
    if goal.max_drop is None:
        return value
    if not judged or not before:
        raise BudgetError(
            "max_drop is judged on validation data, and there is none. Give the Trainer validation "
            "data (quantize(): a score), or ask for max_size alone."
        )
    if value is None:
        raise BudgetError(
            f"max_drop watches {goal.monitor!r}, which was never logged in validation; logged were "
            f"{', '.join(sorted(before)) or 'none'}. Set monitor to one of them."
        )
    if math.isnan(value):
        raise BudgetError(
            f"the float model's {goal.monitor} is NaN, so no drop can be told. Mend the metric or the training."
        )
    return value
