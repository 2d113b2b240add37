"""What the metrics that a validation logs say of themselves: which way they are better, and how large they can be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Nature:
    """What a logged torchmetrics object says of itself.

    Args:
        kind: Its class.
        higher: Whether more is better; None: it does not say.
        most: The largest value it can have; None: it does not say.
    """

    kind: str
    higher: bool | None = None
    most: float | None = None


Natures = Mapping[str, Nature]


def natures_of(inner: Any) -> dict[str, Nature]:
    """Return name -> nature of every metric object that a Trainer's validation has logged.

    Args:
        inner: The Trainer. What it holds of logged objects is private to Lightning: where it is not as expected,
            nothing is known of any metric.
    """
    results = getattr(inner.validate_loop, "_results", None)
    found: dict[str, Nature] = {}
    for item in results.values() if isinstance(results, dict) else ():
        meta, metric = getattr(item, "meta", None), getattr(item, "value", None)
        if meta is not None and not getattr(item, "is_tensor", True):
            nature = _nature(metric)
            found[str(meta.name)] = found[str(meta.forked_name(on_step=False))] = nature
    return found


def nature_of(name: str, natures: Natures) -> Nature | None:
    """Return the nature of a metric, whichever dataloader it is of.

    >>> nature_of("acc/dataloader_idx_1", {"acc": Nature("Accuracy", True)}).higher
    True
    """
    return natures.get(name) or natures.get(name.split("/dataloader_idx_")[0])


def _nature(metric: Any) -> Nature:
    higher, most = (
        getattr(metric, "higher_is_better", None),
        getattr(metric, "plot_upper_bound", None),
    )
    return Nature(
        type(metric).__name__,
        higher if isinstance(higher, bool) else None,
        float(most) if isinstance(most, (int, float)) else None,
    )
