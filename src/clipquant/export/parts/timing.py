"""Latency of several calls in turn, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

REPEATS = 50
_SLOW = 0.5  # seconds a call from which fewer repeats must do
_WARMUP = 3


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS
) -> dict[str, float]:
    """Return the median time of each call in milliseconds, all measured in turn.

    Args:
        calls: Name -> what to time.
        repeats: Times that each is run; ten for calls of half a second or more.

    >>> sorted(interleaved_medians({"a": list, "b": dict}, repeats=3))
    ['a', 'b']
    """
    slowest = max((_seconds(call) for call in calls.values()), default=0.0)
    if slowest > _SLOW:
        repeats = min(repeats, 10)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + _WARMUP):
        for name, call in calls.items():
            spent = _seconds(call)
            if turn >= _WARMUP:
                times[name].append(spent)
    return {name: 1e3 * statistics.median(spent) for name, spent in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
