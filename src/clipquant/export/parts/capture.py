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

from clipquant.export.example import Example, ExportError, largest_difference, largest_size, reason
from clipquant.export.parts.steps import steps_untraced

_SEQUENCES = (
    2,
    3,
)  # dimensions of inputs that may have a length: (batch, length) and (batch, length, features)
_SAME = 1e-4  # of the outputs' size: by how much a traced model may differ at another length


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
    """Return `model` traced in eval mode, for any batch size and any length where its forward allows that.

    A length is a size beside the batch of an input of two or three dimensions; it is left open only where
    the traced model gives the model's own outputs at another one.

    Args:
        model: On the CPU; left as it is, but for its mode, which becomes eval.
        example: A call that it accepts.

    Raises:
        ExportError: If torch.export cannot trace it; the message keeps torch's reason.

    >>> capture(nn.Linear(3, 2), Example((torch.zeros(1, 3),))).dynamic
    True
    """
    model.eval()
    why = fixed = ""
    if example.batch_size:
        two = example.resized(2)
        if any(tensor.dim() in _SEQUENCES for tensor in two.tensors):
            try:
                return _open_lengths(model, two)
            except Exception as error:  # torch.export and a model's forward may raise anything
                fixed = f"sizes beside the batch are fixed at {_sizes(two, 1)}: {reason(error)}"
        try:
            with quiet():
                program = _trace(model, two, _dynamic_shapes(model, two))
            return Capture(program, two, True, (fixed,) if fixed else ())
        except Exception as error:
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
    note = f"input shapes are fixed at {_sizes(example)}"
    return Capture(program, example, False, (f"{note}: {why}" if example.batch_size else note,))


def _sizes(example: Example, first: int = 0) -> list[tuple[int, ...]]:
    return [tuple(tensor.shape[first:]) for tensor in example.tensors]


def _open_lengths(model: nn.Module, example: Example) -> Capture:
    """Return `model` traced with its lengths open, proven on longer inputs."""
    with quiet():
        program = _trace(model, example, _dynamic_shapes(model, example, lengths=True))
        longer = _longer(program, example)
        if longer is not example:
            expected, actual = longer.run(model), longer.run(program.module())
            apart, size = largest_difference(expected, actual), largest_size(expected)
            if not apart <= _SAME * max(size, 1.0):
                raise ExportError(f"at another length the outputs differ by {apart:.2g}")
    return Capture(program, example, True, ())


def _longer(program: ExportedProgram, example: Example) -> Example:
    """Return the example with each open length one longer; itself where none is open."""
    inputs = set(program.graph_signature.user_inputs)
    shapes = iter(
        node.meta["val"].shape
        for node in program.graph.nodes
        if node.op == "placeholder" and node.name in inputs and "val" in node.meta
        and isinstance(node.meta["val"], Tensor)
    )  # fmt: skip
    grown = False

    def lengthen(tensor: Tensor) -> Tensor:
        nonlocal grown
        for axis, size in enumerate(next(shapes)):
            if axis and isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
                grown = True
                index = torch.arange(tensor.shape[axis] + 1) % tensor.shape[axis]
                tensor = tensor.index_select(axis, index)
        return tensor

    longer = example.map(lengthen)
    return longer if grown else example


def _trace(model: nn.Module, example: Example, shapes: Any) -> ExportedProgram:
    with torch.no_grad(), _spelled(model, example):
        return torch.export.export(
            model, example.args, dict(example.kwargs), dynamic_shapes=shapes, strict=False
        )


def _dynamic_shapes(model: nn.Module, example: Example, lengths: bool = False) -> dict[str, Any]:
    """Return the arguments of forward with the open dimensions of each tensor marked."""
    batch, size = Dim("batch"), example.batch_size

    def mark(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        marked: dict[int, Any] = {0: batch} if leaf.dim() > 0 and leaf.shape[0] == size else {}
        if lengths and leaf.dim() in _SEQUENCES:
            marked |= {axis: Dim.AUTO for axis in range(1, leaf.dim()) if leaf.shape[axis] > 1}
        return marked or None

    bound = _signature(model, example).bind(*example.args, **example.kwargs)
    marked: dict[str, Any] = pytree.tree_map(mark, dict(bound.arguments))
    return marked


def _signature(model: nn.Module, example: Example) -> inspect.Signature:
    """Return the signature of forward, keywords of any name as those that the example gives."""
    own = inspect.signature(model.forward).parameters
    known = [p for p in own.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    loose = [] if len(known) == len(own) else [name for name in example.kwargs if name not in own]
    more = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in loose]
    return inspect.Signature([*known, *more])


@contextmanager
def _spelled(model: nn.Module, example: Example) -> Iterator[None]:
    """Show torch.export a forward without keywords of any name, whose open sizes it cannot read."""
    forward, own = model.forward, "forward" in vars(model)
    parameters = inspect.signature(forward).parameters.values()
    if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        yield
        return

    def spelled(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    spelled.__signature__ = _signature(model, example)  # type: ignore[attr-defined]
    model.forward = spelled
    try:
        yield
    finally:
        if own:
            model.forward = forward
        else:
            del model.forward


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
