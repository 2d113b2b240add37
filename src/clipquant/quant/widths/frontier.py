"""Bits for every row of every weight: as little loss as a number of bytes can buy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from clipquant.quant.codes.spec import MAX_BITS

WIDTHS = MAX_BITS + 1  # 0 to 8 bits


@dataclass(frozen=True)
class Choices:
    """What the rows of one weight take and lose at each width.

    Args:
        columns: Weights in a row.
        losses: float64 (rows, 9): expected increase of the loss at 0 to 8 bits; or (rows, choices) beside prices.
        widths: The widths allowed, rising; one alone pins the weight.
        prices: Like `losses`: bytes of each row's codes; None: dense codes of 0 to 8 bits.
    """

    columns: int
    losses: Tensor
    widths: tuple[int, ...] = tuple(range(WIDTHS))
    prices: Tensor | None = None

    def row_bytes(self, width: int) -> int:
        """Return the bytes of one row's codes."""
        return (width * self.columns + 7) // 8

    def costs(self) -> Tensor:
        """Return the bytes of each row's codes at each width, like `losses`: whole numbers where codes are dense."""
        if self.prices is not None:
            return self.prices
        dense = torch.tensor([self.row_bytes(width) for width in range(WIDTHS)])
        return dense.expand(len(self.losses), WIDTHS)

    def code_bytes(self, bits: Tensor) -> int:
        """Return the bytes of all rows' codes at these widths, uint8 (rows,)."""
        return math.ceil(self.costs().gather(1, bits.long()[:, None]).sum())


Allocation = Mapping[str, Tensor]  # name of a weight -> uint8 (rows,): the width of each row


@dataclass(frozen=True)
class Frontier:
    """Every allocation on the rows' convex hulls, as steps in falling order of loss saved a byte.

    Taking the steps from the first to any one gives the least loss possible at that size.

    Args:
        choices: Name of a weight -> its choices.
        weight: int64 (steps,): index of the weight in `choices`.
        row: int64 (steps,).
        start: int64 (steps,): width before the step.
        stop: int64 (steps,): width after it.
        cost: (steps,): bytes added, int64; float64 where some are expected ones of an entropy code.
        saved: float64 (steps,): loss saved.
    """

    choices: Mapping[str, Choices]
    weight: Tensor
    row: Tensor
    start: Tensor
    stop: Tensor
    cost: Tensor
    saved: Tensor

    @property
    def least_bytes(self) -> int:
        """Bytes of all codes before any step."""
        return sum(math.ceil(c.costs()[:, c.widths[0]].sum()) for c in self.choices.values())

    @property
    def estimated(self) -> bool:
        """Whether bytes are expected ones."""
        return self.cost.is_floating_point()

    @property
    def most_bytes(self) -> int:
        """Bytes of all codes after the last step that saves anything."""
        return self.least_bytes + int(self.cost.sum())

    def fill(self, code_bytes: int) -> dict[str, Tensor]:
        """Return the allocation of least loss whose codes take at most `code_bytes` bytes.

        The sweep takes every step in order; where one no longer fits, later and smaller steps of
        other rows still may, so that less than the smallest step stays unused.

        Args:
            code_bytes: At least `least_bytes`.

        Raises:
            ValueError: If not even the smallest allocation fits.
        """
        left: float = code_bytes - self.least_bytes
        if left < 0:
            raise ValueError(f"the codes take at least {self.least_bytes} bytes; got {code_bytes}.")
        spent = self.cost.cumsum(0)
        whole = int(torch.searchsorted(spent, left, right=True))
        taken = torch.zeros(len(self.cost), dtype=torch.bool)
        taken[:whole] = True
        left -= spent[whole - 1].item() if whole else 0
        self._fill_rest(taken, whole, left)
        return self._widths(taken)

    def _fill_rest(self, taken: Tensor, whole: int, left: float) -> None:
        """Mark, after the first step that does not fit, every step that still does."""
        smallest = self.cost[whole:].min().item() if whole < len(self.cost) else 0
        blocked: set[tuple[int, int]] = set()
        cost, weight, row = (part[whole:].tolist() for part in (self.cost, self.weight, self.row))
        for i, price in enumerate(cost):
            if left < smallest:
                return
            place = (weight[i], row[i])
            if price > left or place in blocked:
                blocked.add(place)
                continue
            taken[whole + i] = True
            left -= price

    def _widths(self, taken: Tensor) -> dict[str, Tensor]:
        widths = {}
        for index, (name, choice) in enumerate(self.choices.items()):
            bits = torch.full((len(choice.losses),), choice.widths[0], dtype=torch.int64)
            own = taken & (self.weight == index)
            bits.scatter_reduce_(0, self.row[own], self.stop[own], "amax")
            widths[name] = bits.to(torch.uint8)
        return widths


def frontier(choices: Mapping[str, Choices]) -> Frontier:
    """Return the steps along every row's lower convex hull of loss over bytes.

    Args:
        choices: Name of a weight -> what its rows take and lose.

    Source:
        Shoham and Gersho 1988, "Efficient bit allocation for an arbitrary set of quantizers": a
        Lagrangian sweep visits exactly the hulls' corners.

    >>> losses = torch.tensor([[8.0, 4, 2, 1, 0, 0, 0, 0, 0], [1.0, 0, 0, 0, 0, 0, 0, 0, 0]])
    >>> found = frontier({"w": Choices(8, losses.double())})
    >>> found.fill(3)["w"]
    tensor([2, 1], dtype=torch.uint8)
    """
    parts = [_hull_steps(index, choice) for index, choice in enumerate(choices.values())]
    columns = [torch.cat(column) for column in zip(*parts, strict=True)]
    order = (columns[5] / columns[4]).argsort(descending=True, stable=True)
    weight, row, start, stop, cost, saved = (part[order] for part in columns)
    return Frontier(choices, weight, row, start, stop, cost, saved)


def _hull_steps(index: int, choice: Choices) -> tuple[Tensor, ...]:
    """Return (weight, row, start, stop, cost, saved) of one weight's hull steps."""
    rows = torch.arange(len(choice.losses))
    prices = choice.costs()
    current = torch.full_like(rows, choice.widths[0])
    steps = []
    for _ in choice.widths[1:]:
        stop, slope = _steepest(choice, prices[rows], current[rows], rows)
        rows, stop = rows[slope > 0], stop[slope > 0]
        start = current[rows]
        saved = choice.losses[rows, start] - choice.losses[rows, stop]
        own = torch.full_like(rows, index)
        steps.append((own, rows, start, stop, prices[rows, stop] - prices[rows, start], saved))
        current[rows] = stop
    empty = torch.zeros(0, dtype=torch.int64)
    first = (empty, empty, empty, empty, empty.to(prices.dtype), empty.double())
    return tuple(torch.cat(column) for column in zip(first, *steps, strict=True))


def _steepest(
    choice: Choices, prices: Tensor, current: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """Return for each row the width of the steepest fall of loss from where it is, and its slope."""
    losses = choice.losses[rows]
    allowed = torch.zeros(losses.shape[1], dtype=torch.bool)
    allowed[list(choice.widths)] = True
    saved = losses.gather(1, current[:, None]) - losses
    cost = prices - prices.gather(1, current[:, None])
    slope = torch.where((cost > 0) & allowed, saved / cost, -math.inf)
    best = slope.max(dim=1)
    return best.indices, best.values
