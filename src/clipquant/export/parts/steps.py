"""Recurrent layers traced without their steps: torch would run each of them to learn the outputs' shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._subclasses.fake_tensor import FakeTensor

_KEYS = (torch._C.DispatchKey.CompositeImplicitAutograd, torch._C.DispatchKey.Autograd)


@contextmanager
def steps_untraced() -> Iterator[None]:
    """Give the shapes of a recurrent layer's outputs at once wherever tensors hold no values.

    Tracing decomposes the layer step by step only to throw that away: its operator stays one node of the
    graph. Where this torch keeps its decompositions elsewhere, nothing changes but the time it takes.
    """
    replaced: list[tuple[Any, Any, Any]] = []
    for op in _operators():
        tables = [(op.py_kernels, key) for key in _KEYS] + [(decomposition_table, op)]
        for table, key in tables:
            own = table.get(key)
            if own is not None:
                replaced.append((table, key, own))
                table[key] = _shapes(own)
        op._dispatch_cache.clear()
    try:
        yield
    finally:
        for table, key, own in replaced:
            table[key] = own
        for op in _operators():
            op._dispatch_cache.clear()


def _operators() -> Iterator[Any]:
    for name in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
        op = getattr(getattr(torch.ops.aten, name, None), "input", None)
        if hasattr(op, "py_kernels") and hasattr(op, "_dispatch_cache"):
            yield op


def _shapes(own: Callable[..., Any]) -> Callable[..., Any]:
    """Return a kernel that makes empty outputs where the inputs are empty themselves."""

    def kernel(
        inputs: Tensor, state: Any, params: Any, biases: bool, layers: int, dropout: float,
        train: bool, bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        if not isinstance(inputs, FakeTensor):
            return own(
                inputs, state, params, biases, layers, dropout, train, bidirectional, batch_first
            )
        states = list(state) if isinstance(state, (tuple, list)) else [state]
        width = states[0].shape[-1] * (2 if bidirectional else 1)
        outputs = inputs.new_empty((*inputs.shape[:-1], width))
        return (outputs, *(one.new_empty(one.shape) for one in states))

    return kernel
