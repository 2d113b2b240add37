"""The smallest size that holds, found with few trials."""

from __future__ import annotations

from collections.abc import Callable, Sequence

MAX_TRIALS = 10


def smallest_that_holds(
    holds: Callable[[int], bool], sizes: Sequence[int], trials: int = MAX_TRIALS
) -> int | None:
    """Return the smallest of `sizes` that was tried and held, by bisection with at most `trials` calls.

    The metric need not be monotone: what is returned was itself tried.

    Args:
        holds: Judges a size.
        sizes: Rising, without repeats.
        trials: Most calls.

    Returns:
        The size; None where none held.

    >>> smallest_that_holds(lambda size: size >= 70, range(1, 101))
    70
    """
    low, high = -1, len(sizes)  # sizes[low] fails, sizes[high] holds
    for trial in range(trials):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if trial == trials - 1 and high == len(sizes):
            middle = high - 1  # nothing has held: the last word is the largest's
        if holds(sizes[middle]):
            high = middle
        else:
            low = middle
    return sizes[high] if high < len(sizes) else None
