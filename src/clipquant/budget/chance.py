"""How much of a metric's change is chance: validation is a sample, judged in disjoint parts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

from clipquant.budget.goal import Metrics
from clipquant.report.record import drop_of

_NORMAL = NormalDist()
_WHOLE = 0.02  # how near to a whole number a count is, that was summed in float32


@dataclass(frozen=True)
class Parts:
    """A metric over disjoint parts of the validation data.

    Args:
        samples: Of each part: its samples, or another measure of its size.
        without: The metric over all parts but one, for each part left out.
        whole: The metric over all of them.
    """

    samples: tuple[float, ...]
    without: tuple[float, ...]
    whole: float

    @classmethod
    def of_means(cls, samples: Sequence[float], sums: Sequence[float]) -> Parts:
        """Return the parts of a metric that is a mean: each part's samples and its sum over them.

        >>> Parts.of_means([1, 1, 2], [0.0, 1.0, 2.0]).without
        (1.0, 0.6666666666666666, 0.5)
        """
        count, total = sum(samples), sum(sums)
        without = tuple((total - s) / (count - n) for n, s in zip(samples, sums, strict=True))
        return cls(tuple(map(float, samples)), without, total / count)

    def means(self) -> list[float]:
        """Return each part's own value, for a metric that is a mean."""
        count = sum(self.samples)
        return [
            (self.whole * count - w * (count - n)) / n
            for n, w in zip(self.samples, self.without, strict=True)
        ]


@dataclass(frozen=True)
class Judged:
    """What a validation says of some weights.

    Args:
        metrics: Name -> value over all data, as the user's own validation aggregates it.
        parts: Name -> the same over parts of the data, for those that can be had.
        whole_only: Why a metric has no parts, in words; empty where nobody asked.
    """

    metrics: Metrics
    parts: Mapping[str, Parts] = field(default_factory=dict)
    whole_only: str = ""


@dataclass(frozen=True)
class Drop:
    """How much worse a metric got, and how far that is to be believed.

    Args:
        value: Of all the data, in the metric's own units.
        error: Its standard error; None: not known.
        step: What one sample more or less can make of it, for a metric that is a share of the samples; else 0.
        parts: How many the error is from.
    """

    value: float
    error: float | None = None
    step: float = 0.0
    parts: int = 0

    @property
    def shown_error(self) -> float | None:
        """The standard error with as many digits as a report keeps."""
        return None if self.error is None else float(f"{self.error:.4g}")

    def score(self, most: float) -> float:
        """Return how many standard errors lie between this drop and the most that is allowed.

        The error is that of a drop as large as allowed: where a share of the samples is what counts, each sample
        lost beyond those seen adds its own variance, so that a network that lost none of a few samples is not
        taken for one that never will.

        Args:
            most: The drop allowed.

        Source:
            Wilson 1927, the score interval, for small shares.

        >>> round(Drop(0.0, 0.0, step=0.01, parts=20).score(0.03), 2)  # none of 100 lost: rather sure of 3
        1.73
        """
        room = most - self.value
        if self.error is None:
            return math.inf if room >= -1e-9 else -math.inf
        spread = math.sqrt(self.error**2 + abs(room) * self.step)
        if spread <= 1e-12 * max(abs(self.value), abs(most), 1e-300):
            return math.inf if room >= -1e-9 else -math.inf
        return (room + 1e-9) / spread

    def sure(self, most: float) -> float | None:
        """Return how sure it is that the true drop is at most `most`; None where no error is known.

        >>> round(Drop(0.0, 0.01, parts=1000).sure(0.01), 2)
        0.84
        """
        if self.error is None:
            return None
        return _NORMAL.cdf(_normal(self.score(most), self.parts - 1))

    def holds(self, most: float, confidence: float | None = None) -> bool:
        """Return whether it is at most `most`: with one standard error more, or as surely as asked.

        Args:
            most: The drop allowed.
            confidence: How sure; None: one standard error.

        >>> Drop(0.008, 0.001).holds(0.01), Drop(0.008, 0.003).holds(0.01), Drop(0.008).holds(0.01)
        (True, False, True)
        """
        if math.isnan(self.value):
            return False
        if confidence is None or self.error is None:
            return self.score(most) >= 1
        return (self.sure(most) or 0.0) >= confidence


def drop_between(before: Judged, after: Judged, monitor: str, mode: str) -> Drop:
    """Return how much worse a metric got, with its standard error where both were judged on the same parts.

    Float and quantized network meet the same samples, so the parts' differences are what varies.

    Args:
        before: Of the float network.
        after: Of the quantized one.
        monitor: The metric.
        mode: Whether it is better when smaller ("min") or larger ("max").

    Source:
        Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m".

    >>> right, left = Parts.of_means([10] * 4, [9, 8, 9, 10]), Parts.of_means([10] * 4, [8, 8, 8, 10])
    >>> drop = drop_between(Judged({"acc": 0.9}, {"acc": right}), Judged({"acc": 0.85}, {"acc": left}), "acc", "max")
    >>> round(drop.value, 3), round(drop.error, 3)
    (0.05, 0.029)
    """
    value = drop_of(before.metrics[monitor], after.metrics.get(monitor, math.nan), mode)
    a, b = before.parts.get(monitor), after.parts.get(monitor)
    if a is None or b is None or a.samples != b.samples or len(a.samples) < 2:
        return Drop(value)
    without = [drop_of(x, y, mode) for x, y in zip(a.without, b.without, strict=True)]
    error = jackknife_error(a.samples, without, drop_of(a.whole, b.whole, mode))
    if not math.isfinite(error):
        return Drop(value)
    return Drop(value, error, _step(a, b, mode), len(without))


def jackknife_error(samples: Sequence[float], without: Sequence[float], whole: float) -> float:
    """Return the standard error of a statistic from its values with one part of the data left out each time.

    Args:
        samples: Of each part.
        without: The statistic without each part.
        whole: The statistic of all parts.

    Source:
        Busing, Meijer and van der Leeden 1999, "Delete-m jackknife for unequal m".

    >>> round(jackknife_error([1] * 4, [2.0, 7 / 3, 8 / 3, 3.0], 2.5), 3)  # of the mean of 4, 3, 2 and 1
    0.645
    """
    total, parts = sum(samples), len(samples)
    centre = parts * whole - sum((1 - n / total) * w for n, w in zip(samples, without, strict=True))
    squares = (
        (total / n * whole - (total / n - 1) * w - centre) ** 2 / (total / n - 1)
        for n, w in zip(samples, without, strict=True)
    )
    return math.sqrt(sum(squares) / parts)


def _step(before: Parts, after: Parts, mode: str) -> float:
    """Return what one sample changes in a metric that counts samples; 0 for one that measures.

    One that counts is a whole number of samples in each part, or of per cents of them. One that is put together
    of such, as a mean over classes, is known by parts without any change.
    """
    own, other = before.means(), after.means()
    count = sum(before.samples)
    for unit in (1.0, 100.0):
        shares = [v / unit for v in (*own, *other)]
        counts = [v * n for v, n in zip(shares, before.samples * 2, strict=True)]
        if all(abs(c - round(c)) < _WHOLE for c in counts) and all(
            -1e-6 < v < 1 + 1e-6 for v in shares
        ):
            return unit / count
    unchanged = sum(abs(x - y) < 1e-6 for x, y in zip(own, other, strict=True))
    rare = mode == "max" and 2 * unchanged > len(own) and 0 <= after.whole <= before.whole <= 1
    return 1 / count if rare else 0.0


def _normal(t: float, degrees: int) -> float:
    """Return the quantile of the normal distribution that is as likely as one of Student's.

    Source:
        Wallace 1959, "Bounds on normal approximations to Student's and the chi-square distributions".
    """
    if math.isinf(t):
        return t
    near = math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.copysign((8 * degrees + 1) / (8 * degrees + 3) * near, t)
