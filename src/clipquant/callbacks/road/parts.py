"""A logged metric over disjoint parts of the validation batches, read off the one pass that gives the whole."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat, dim_zero_sum

from clipquant.budget.chance import Parts

MOST = 32  # parts: the standard error is then known to an eighth of itself
_NEAR = 1e-4  # of a metric: what is put together of parts must be the whole that Lightning gives
_LARGE = 1 << 17  # elements of a metric's states, of which each part keeps its own


class Recorder:
    """Adds what each step has changed in a logged metric to one of the parts; batch n belongs to part n modulo 32.

    Lightning keeps a mean as a sum and a count, and a torchmetrics object keeps states that are summed or
    appended to: the difference that a batch makes is the batch's own. Nothing of the user's is changed. Parts
    that lie across the whole data are alike where the data are sorted, by class for instance.

    Args:
        monitor: The metric's name; with several dataloaders, that of each.

    Attributes:
        batches: How many the pass had, of each dataloader.
        parts: Name of a metric -> its parts, once the pass has ended.
    """

    def __init__(self, monitor: str) -> None:
        self.monitor = monitor.split("/dataloader_idx_")[0]
        self.batches: list[float] = []
        self.parts: dict[str, Parts] = {}
        self._of: dict[str, _Metric] = {}

    def note_(self, results: Any, place: int, batch: Any) -> None:
        """Take in what a step has logged.

        Args:
            results: Lightning's collection of what was logged; private to it: where it is not as expected,
                there are no parts.
            place: Number of the step.
            batch: What the step got.
        """
        with suppress(Exception):
            for key, item in results.items():
                if self.monitor in (item.meta.name, item.meta.forked_name(on_step=False)):
                    own = self._of.setdefault(key, _Metric(item))
                    own.note_(place % MOST, samples_of(batch))

    def end_(self, metrics: Mapping[str, float], batches: Sequence[float]) -> None:
        """Take the parts together, of each metric of which they make up the whole.

        Args:
            metrics: What the pass has logged.
            batches: How many it had, of each dataloader.
        """
        self.batches = list(batches)
        for own in self._of.values():
            name = f"{self.monitor}{own.suffix}"
            with suppress(Exception):  # of a metric that cannot be taken apart
                parts = own.parts()
                off = abs(parts.whole - metrics[name])
                if off <= _NEAR * max(abs(metrics[name]), 1e-3) and is_finite(parts):
                    self.parts[name] = parts


@dataclass
class _Metric:
    """One logged metric, and what each part has changed in its states."""

    item: Any
    last: dict[str, Any] = field(default_factory=dict)
    changes: dict[int, dict[str, Any]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    broken: bool = False

    @property
    def suffix(self) -> str:
        meta = self.item.meta
        several = meta.add_dataloader_idx and meta.dataloader_idx is not None
        return f"/dataloader_idx_{meta.dataloader_idx}" if several else ""

    def note_(self, part: int, samples: int) -> None:
        """Add what has changed since the last step to a part."""
        if self.broken:
            return
        self.broken = True  # unless this ends well
        change: dict[str, Any] = {}
        for name, value in _states(self.item).items():
            if isinstance(value, list):
                change[name] = value[self.last.get(name, 0) :]
                self.last[name] = len(value)
            else:
                change[name] = value - self.last.get(name, self._start(name))
                self.last[name] = value.clone()
        own = self.changes.get(part)
        self.changes[part] = change if own is None else {n: own[n] + change[n] for n in change}
        self.samples[part] = self.samples.get(part, 0) + max(samples, 1)
        self.broken = False

    def _start(self, name: str) -> Any:
        return (
            0.0
            if self.item.is_tensor
            else self.item.value._defaults[name].to(self.item.value.device)
        )

    def parts(self) -> Parts:
        """Return the metric of all parts, and without each."""
        if self.broken or len(self.changes) < 2:
            raise ValueError("it has no parts")
        changes = [self.changes[part] for part in sorted(self.changes)]
        if self.item.is_tensor:
            counted = [c for c in changes if c["cumulated_batch_size"]]
            counts = [float(c["cumulated_batch_size"]) for c in counted]
            return Parts.of_means(counts, [float(c["value"]) for c in counted])
        metric = copy.deepcopy(self.item.value)
        whole = _computed(metric, changes)
        without = (_computed(metric, changes[:i] + changes[i + 1 :]) for i in range(len(changes)))
        return Parts(
            tuple(float(self.samples[n]) for n in sorted(self.samples)), tuple(without), whole
        )


def _computed(metric: Any, changes: Sequence[Mapping[str, Any]]) -> float:
    """Return a metric object's value of some parts."""
    metric.reset()
    for name, start in metric._defaults.items():
        values = [change[name] for change in changes]
        if isinstance(start, list):
            setattr(metric, name, [item for value in values for item in value])
        else:
            setattr(metric, name, sum(values, start.to(metric.device)))
    metric._update_count = 1
    with torch.no_grad():
        return float(metric.compute())


def _states(item: Any) -> dict[str, Any]:
    """Return the states that a logged metric keeps, as long as they are summed or appended to.

    Raises:
        ValueError: If they are something else, of which no part can be told.
    """
    if item.is_tensor:
        if not item.meta.is_mean_reduction:
            raise ValueError("it is not a mean")
        return {name: getattr(item, name) for name in ("value", "cumulated_batch_size")}
    metric = item.value
    found: dict[str, Any] = {name: getattr(metric, name) for name in metric._defaults}
    for name, value in found.items():
        wanted = (dim_zero_cat, None) if isinstance(value, list) else (dim_zero_sum,)
        if metric._reductions[name] not in wanted:
            raise ValueError(f"its state {name} is neither summed nor appended to")
    if not found or sum(v.numel() for v in found.values() if isinstance(v, Tensor)) > _LARGE:
        raise ValueError("it keeps no state of its own, or too much")
    return found


def samples_of(batch: Any) -> int:
    """Return the length of the first tensor in a batch.

    >>> samples_of({"x": [torch.ones(3, 2)]})
    3
    """
    if isinstance(batch, Tensor):
        return len(batch) if batch.dim() else 1
    items = batch.values() if isinstance(batch, Mapping) else batch
    if not isinstance(items, Iterable) or isinstance(items, (str, bytes, Iterator)):
        return 0
    return next((n for n in map(samples_of, items) if n), 0)


def is_finite(parts: Parts) -> bool:
    """Return whether a metric is finite whichever part is left out."""
    return all(map(math.isfinite, (parts.whole, *parts.without)))
