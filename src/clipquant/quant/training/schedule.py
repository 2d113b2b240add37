"""How sparse weights are at a share of the way to their final sparsity."""

from __future__ import annotations

from collections.abc import Callable, Mapping

Schedule = Callable[[float], float]


def cubic(done: float) -> float:
    """Return the share of the final sparsity that is reached: fast at first, ever slower towards the end.

    Source:
        Zhu and Gupta 2017, arXiv 1710.01878, equation 1.

    >>> cubic(0.0), cubic(0.5), cubic(1.0)
    (0.0, 0.875, 1.0)
    """
    return 1 - (1 - done) ** 3


def linear(done: float) -> float:
    """Return the share of the way itself."""
    return done


def at_once(done: float) -> float:  # noqa: ARG001 - every schedule takes the share of the way
    """Return all from the beginning on."""
    return 1.0


SCHEDULES: Mapping[str, Schedule] = {"cubic": cubic, "linear": linear, "once": at_once}
