"""Skipping a step of an optimizer that evaluates gradients several times and moves in between."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer
from torch.utils.hooks import RemovableHandle


class Evaluations:
    """The evaluations of one LBFGS step: where it started, and whether it is to be skipped as a whole.

    At a later evaluation the parameters have moved already. So the start is kept, and put back when the step has ended.
    Until then gradients that are not finite stay as they are: zeros would end a line search with an IndexError.

    Args:
        optimizer: The optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._start: list[tuple[Tensor, Tensor]] = []
        self._state: dict[Any, Any] = {}
        self.skipping = False
        self._handle: RemovableHandle = optimizer.register_step_post_hook(self._end)

    @classmethod
    def of(cls, optimizer: Optimizer) -> Evaluations | None:
        """Return the evaluations of an optimizer that has several in a step; None for every other."""
        return cls(optimizer) if isinstance(optimizer, LBFGS) else None

    @torch.no_grad()
    def begin(self) -> None:
        """Keep parameters and state as they are, unless the step has begun already."""
        if self._start:
            return
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        self._start = [(param, param.detach().clone()) for param in params]
        # Shallow per entry: LBFGS replaces its tensors and lists, apart from the lists it appends to.
        self._state = {
            key: {name: copy.deepcopy(value) for name, value in entry.items()}
            for key, entry in self._optimizer.state.items()
        }

    def remove(self) -> None:
        """Take the hook off the optimizer."""
        self._handle.remove()

    @torch.no_grad()
    def _end(self, *_: Any) -> None:
        if self.skipping:
            for param, value in self._start:
                param.copy_(value)
                param.grad = None
            self._optimizer.state.clear()
            self._optimizer.state.update(self._state)
        self._start, self._state, self.skipping = [], {}, False
