"""From a module to a graph: torch.export with a dynamic batch where the model allows one."""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from clipquant.export.example import Example, ExportError, reason
from clipquant.export.parts.steps import steps_untraced


@dataclass(frozen=True)
class Capture:
    """A traced model, the call it was traced with, and what the reader should know.

    Args:
        program: The graph.
        example: Its call, of two rows where the batch is dynamic.
        dynamic: Whether any batch size is accepted.
        notes: What the reader should know.
    """

    program: ExportedProgram
    example: Example
    dynamic: bool
    notes: tuple[str, ...]

    @property
    def check(self) -> Example:
        """A call to compare outputs on: of another batch size than was traced, where any is fine."""
        return self.example.resized(3) if self.dynamic else self.example


def capture(model: nn.Module, example: Example) -> Capture:
    """Return `model` traced in eval mode, for any batch size where its forward allows that.

    Args:
        model: On the CPU; left as it is, but for its mode, which becomes eval.
        example: A call that it accepts.

    Raises:
        ExportError: If torch.export cannot trace it; the message keeps torch's reason.

    >>> capture(nn.Linear(3, 2), Example((torch.zeros(1, 3),))).dynamic
    True
    """
    model.eval()
    if example.batch_size:
        two = example.resized(2)
        try:
            with quiet():
                program = _trace(model, two, _dynamic_shapes(model, two))
            return Capture(program, two, True, ())
        except Exception as error:  # torch.export and a model's forward may raise anything
            why = reason(error)
    try:
        with quiet():
            program = _trace(model, example, None)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot capture {type(model).__name__}.forward: {reason(error)}. "
            "Write the branch or shape that depends on data with torch.where, torch.cond or a "
            "fixed size."
        ) from error
    sizes = [tuple(tensor.shape) for tensor in example.tensors]
    note = f"input shapes are fixed at {sizes}"
    return Capture(program, example, False, (f"{note}: {why}" if example.batch_size else note,))


def _trace(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    with torch.no_grad():
        return torch.export.export(
            model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
        )


def _dynamic_shapes(model: nn.Module, example: Example) -> dict[str, Any]:
    """Return the arguments of forward with the batch dimension of each tensor marked."""
    batch, size = Dim("batch"), example.batch_size

    def mark(leaf: Any) -> Any:
        batched = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == size
        return {0: batch} if batched else None

    bound = inspect.signature(model.forward).bind(*example.args, **example.kwargs)
    marked: dict[str, Any] = pytree.tree_map(mark, dict(bound.arguments))
    return marked


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' chatter off the screen; what matters stands in an export's notes."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            redirect_stdout(StringIO()),
            redirect_stderr(StringIO()),
            steps_untraced(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
