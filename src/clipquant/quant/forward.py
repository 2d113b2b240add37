"""Running a model on batches: the batches, what a batch is to it, and a copy that shares its tensors."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

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


def twin(model: nn.Module) -> nn.Module:
    """Return a copy of a model in eval mode that shares every tensor with it.

    >>> model = nn.Linear(2, 1)
    >>> twin(model).weight is model.weight, twin(model) is model
    (True, False)
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        held = [*module._parameters.values(), *module._buffers.values(), *vars(module).values()]
        memo.update({id(t): t for t in held if isinstance(t, Tensor)})
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception:  # whatever an attribute's own copying raises
        return _skeleton(model, {}).eval()


def _skeleton(model: nn.Module, made: dict[int, nn.Module]) -> nn.Module:
    """Return modules of their own that share every attribute, for a model that cannot be copied deeply."""
    if id(model) not in made:
        new = made[id(model)] = copy.copy(model)
        own = {k: v.copy() for k, v in vars(new).items() if isinstance(v, dict)}  # hooks among them
        vars(new).update(own)
        for name, child in model._modules.items():
            new._modules[name] = None if child is None else _skeleton(child, made)
    return made[id(model)]
