"""Running a model on batches: which, how, and what a batch is to it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils._pytree import tree_map

from clipquant.errors import ArgumentError, RunError

Forward: TypeAlias = Callable[[nn.Module, Any], Any]  # runs the model on a batch as it was visited
Progress: TypeAlias = Callable[[str, int, int], None]  # weight's name, steps done, steps in all
Visit: TypeAlias = Callable[
    [int, Any], None
]  # number of a batch, and the batch ready for `Forward`
Loop: TypeAlias = Callable[[Sequence[Any], Sequence[int], Visit], None]


class EndLoop(Exception):  # noqa: N818 - raised to end a loop, not to tell of an error
    """Raised by a visit that has seen enough."""


def plain_loop(batches: Sequence[Any], order: Sequence[int], visit: Visit) -> None:
    """Visit batches by number, as they are."""
    for number in order:
        visit(number, batches[number])


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


@dataclass(frozen=True)
class Calibration:
    """Batches, and how a model is run on them.

    Args:
        batches: Inputs.
        forward: Runs the model on a batch that `loop` brings.
        progress: Told the weight's name, the steps done and the steps in all, before each step.
        device: Where the model and what is computed of it lie; None: where the model is.
        loop: Brings batches, by number, to a visit.
    """

    batches: Sequence[Any]
    forward: Forward = call_model
    progress: Progress | None = None
    device: torch.device | None = None
    loop: Loop = plain_loop

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def apart(self) -> range:
        """Numbers of the batches that nothing is fitted to, so that what was fitted can be judged on them.

        >>> list(Calibration(range(8)).apart), list(Calibration(range(3)).apart)
        ([3, 7], [])
        """
        return range(3, len(self.batches), 4)

    def fitted(self, number: int) -> float:
        """Return the share of a batch's samples, from the first on, that something may be fitted to."""
        if self.apart:
            return 0.0 if number in self.apart else 1.0
        return 0.75

    def each(self, visit: Visit, order: Sequence[int] | None = None) -> None:
        """Visit every batch, or those of some numbers in their order, until a visit raises `EndLoop`.

        >>> Calibration(["a", "b"]).each(print)
        0 a
        1 b
        """
        try:
            self.loop(self.batches, range(len(self.batches)) if order is None else order, visit)
        except EndLoop:
            return

    def tell(self, name: str, done: int, steps: int) -> None:
        """Report progress, where somebody listens."""
        if self.progress is not None:
            self.progress(name, done, steps)

    def first(self, count: int) -> Calibration:
        """Return the first batches alone, told to nobody."""
        return Calibration(self.batches[:count], self.forward, None, self.device, self.loop)


def ordinary(batch: Any) -> Any:
    """Return a batch whose tensors can take part in a graph, also where it was made under inference_mode."""

    def copied(value: Any) -> Any:
        inference = isinstance(value, torch.Tensor) and value.is_inference()
        return value.clone() if inference else value

    with torch.inference_mode(False):
        return tree_map(copied, batch)


def calibration_data(data: Iterable[Any], count: int) -> list[Any]:
    """Return the first `count` batches of `data`, which may be endless.

    Raises:
        ValueError: If there is none, though some were asked for.
        RuntimeError: If the loader raises, naming the batch.

    >>> calibration_data(iter([1, 2, 3]), 2)
    [1, 2]
    """
    if count != int(count) or count < 0:
        raise ArgumentError(
            f"calibration_batches must be a whole number, 0 or more; got {count!r}."
        )
    batches: list[Any] = []
    if count == 0:
        return batches
    try:
        batches.extend(map(ordinary, islice(iter(data), count)))
    except Exception as error:
        raise RunError(
            f"calibration needs {count} batches, but the data raised at batch {len(batches)}: "
            f"{type(error).__name__}: {error}. Mend the loader, or ask for calibration_batches=0."
        ) from error
    if not batches:
        raise ArgumentError(
            f"calibration needs batches (calibration_batches={count}); the data gave none. "
            "Pass data that is not empty (an iterator gives its batches only once), or "
            "calibration_batches=0 for a data-free method."
        )
    return batches
