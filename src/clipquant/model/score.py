"""A score of the user's own: one figure of a model, or one of each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from clipquant.budget.chance import Judged, Parts
from clipquant.errors import RunError

Score: TypeAlias = Callable[[nn.Module], "float | Tensor"]
NAME = "score"
_PARTS = 256
_ONE = "score gives one figure, not one for each sample"


def judged_by(score: Score, model: nn.Module) -> Judged:
    """Return what a score says of a model.

    Args:
        score: Gives a figure of merit; or a tensor of them, one for each sample, of which the mean counts.
        model: The model.

    >>> judged_by(lambda model: torch.tensor([1.0, 0.0]), nn.Identity())
    Judged(metrics={'score': 0.5}, parts={'score': Parts(samples=(1.0, 1.0), without=(0.0, 1.0), whole=0.5)}, \
whole_only='')
    """
    value = score(model)
    if not isinstance(value, Tensor) or value.numel() < 2:
        return Judged({NAME: _number(value)}, whole_only=_ONE)
    samples = value.detach().flatten().double().cpu()
    part = torch.arange(len(samples)) % min(len(samples), _PARTS)
    sums = torch.bincount(part, weights=samples)
    parts = Parts.of_means(torch.bincount(part).tolist(), sums.tolist())
    return Judged({NAME: parts.whole}, {NAME: parts})


def _number(value: object) -> float:
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise RunError(
            f"score must return a number, higher is better; got {value!r}. Return it from the function, as in "
            "lambda model: accuracy(model, batches)."
        ) from error
