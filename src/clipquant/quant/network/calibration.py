"""Running a model on batches: the batches, and what a batch is to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import nn

Forward: TypeAlias = Callable[[nn.Module, Any], Any]


def calibration_data(data: Iterable[Any], count: int) -> list[Any]:
    """Return the first `count` batches of `data`, which may be endless.

    Raises:
        ValueError: If there is none, though some were asked for.
        RuntimeError: If the loader raises, naming the batch.

    >>> calibration_data(iter([1, 2, 3]), 2)
    [1, 2]
    """
    if count != int(count) or count < 0:
        raise ValueError(f"calibration_batches must be a whole number, 0 or more; got {count!r}.")
    batches: list[Any] = []
    if count == 0:
        return batches
    try:
        batches.extend(islice(iter(data), count))
    except Exception as error:
        raise RuntimeError(
            f"calibration needs {count} batches, but the data raised at batch {len(batches)}: "
            f"{type(error).__name__}: {error}. Mend the loader, or ask for calibration_batches=0."
        ) from error
    if not batches:
        raise ValueError(
            f"calibration needs batches (calibration_batches={count}); the data gave none. "
            "Pass data that is not empty (an iterator gives its batches only once), or "
            "calibration_batches=0 for a data-free method."
        )
    return batches


def call_model(model: nn.Module, batch: Any) -> Any:
    """Return the model's output for a batch: a dict is keywords, a tuple positions, all else one input.

    Items of a tuple beyond what `forward` accepts, such as labels, are left out.

    >>> call_model(nn.Linear(2, 1), (torch.ones(1, 2), torch.ones(1))).shape
    torch.Size([1, 1])
    """
    if isinstance(batch, Mapping):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not isinstance(
        batch, torch.nn.utils.rnn.PackedSequence
    ):
        return model(*batch[: _accepted(model)])
    return model(batch)


def _accepted(model: nn.Module) -> int | None:
    kinds = [p.kind for p in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return None
    return sum(
        kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        for kind in kinds
    )


Progress: TypeAlias = Callable[[str, int, int], None]  # weight's name, steps done, steps in all
