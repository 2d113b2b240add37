"""How far a file's outputs are from the model's, where there is no metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipquant.export.example import Example, largest_difference
from clipquant.export.parts.subject import Forward, Judge, Judgement

_COMPARED = 4  # batches


def relative_error(plain: nn.Module, batches: Sequence[Example], forward: Forward) -> float:
    """Return the norm of what differs from the model's floating outputs on the first batches, over their norm.

    Args:
        plain: The model.
        batches: Calls, of which four are run.
        forward: What is compared with it; infinities and NaN count as 0 in both.
    """
    noise = signal = 0.0
    for batch in batches[:_COMPARED]:
        pairs = zip(
            *(map(_floats, (batch.run(plain), forward(*batch.args, **batch.kwargs)))), strict=True
        )
        for expected, actual in pairs:
            noise += float((expected - actual).square().sum())
            signal += float(expected.square().sum())
    return math.sqrt(noise / signal) if signal else 0.0


def _floats(outputs: Any) -> list[Tensor]:
    """Return what is finite of the floating tensors among outputs."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
    return [t.double().nan_to_num(0.0, 0.0, 0.0) for t in leaves if t.is_floating_point()]


def distance_judge(plain: nn.Module, batches: Sequence[Example]) -> Judge:
    """Return a judge by the relative error of the outputs, where there is no metric."""

    def judge(forward: Forward) -> Judgement:
        errors = []
        for batch in batches:
            expected = batch.run(plain)
            size = max((float(t.abs().max()) for t in pytree.tree_leaves(expected)), default=1.0)
            errors.append(
                largest_difference(expected, forward(*batch.args, **batch.kwargs)) / (size or 1.0)
            )
        return Judgement(float(np.mean(errors)), {})

    return judge
