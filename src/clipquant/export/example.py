"""One call of a model's forward: what an export is traced with and checked against."""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipquant.errors import ArgumentError

_LABELS = frozenset({"label", "labels", "target", "targets", "y"})
_CODES = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]")  # what colours a terminal
_LONGEST = 300  # characters of another library's message that a report repeats


class ExportError(ArgumentError):
    """A model that cannot be exported: says why, and what to do."""


@dataclass(frozen=True)
class Example:
    """The arguments of one call of a model's forward.

    Args:
        args: Positional arguments: tensors, or tuples, lists and dicts of them.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor among the arguments, in their order."""
        leaves = pytree.tree_leaves((self.args, dict(self.kwargs)))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    @property
    def batch_size(self) -> int | None:
        """The size that most tensors' first dimension has; None without such a tensor."""
        sizes = Counter(t.shape[0] for t in self.tensors if t.dim() > 0)
        return max(sizes, key=lambda size: sizes[size]) if sizes else None

    def map(self, change: Callable[[Tensor], Any]) -> Example:
        """Return the example with `change` applied to each tensor."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, dict(self.kwargs)))
        return Example(args, kwargs)

    def resized(self, size: int) -> Example:
        """Return the example with `size` rows a batch: cut, or repeated from the start."""
        batch = self.batch_size

        def resize(tensor: Tensor) -> Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != batch or batch == 0:
                return tensor
            return tensor[torch.arange(size) % batch].contiguous()

        return self.map(resize)

    def rows(self, start: int, stop: int) -> Example:
        """Return the example with rows `start` to `stop` of each batched tensor."""
        batch = self.batch_size
        return self.map(lambda t: t[start:stop] if t.dim() and t.shape[0] == batch else t)

    def run(self, model: nn.Module) -> Any:
        """Return the model's outputs, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


def as_example(inputs: Any) -> Example:
    """Return inputs in Lightning's form: a tensor, a tuple of arguments, or a dict of keywords.

    Args:
        inputs: As a module's `example_input_array`.

    >>> as_example({"x": torch.zeros(2, 3)}).batch_size
    2
    """
    if isinstance(inputs, Example):
        return inputs
    if isinstance(inputs, Mapping):
        return Example((), dict(inputs))
    if isinstance(inputs, (tuple, list)):
        return Example(tuple(inputs))
    return Example((inputs,))


def find_example(
    model: nn.Module, batch: Any = None, *, own: bool = True, call: Example | None = None
) -> Example:
    """Return a call that `model` accepts: its `example_input_array`, or made from a data batch.

    Args:
        model: Any module.
        batch: What a dataloader gives: the inputs alone, (inputs, targets), or a dict with them.
        own: Whether the model's `example_input_array` comes first.
        call: What forward was seen to be called with for the batch, which comes before what may be
            read from it; without labels among the keywords where forward can do without.

    Raises:
        ExportError: If neither gives a call that runs.

    >>> find_example(nn.Linear(3, 2), [torch.zeros(4, 3), torch.zeros(4)]).args[0].shape
    torch.Size([4, 3])
    """
    given = getattr(model, "example_input_array", None) if own else None
    candidates = [] if given is None else [as_example(given)]
    candidates += [] if call is None else [_without_labels(call), call]
    candidates += [] if batch is None else _readings(model, batch)
    failures = []
    for candidate in candidates:
        try:
            candidate.run(model)
        except Exception as error:  # noqa: PERF203 - a model's forward may raise anything
            failures.append(reason(error))
        else:
            return candidate
    raise ExportError(
        f"no example input for {type(model).__name__}.forward could be inferred: "
        f"{'; '.join(dict.fromkeys(failures)) or 'no example_input_array, and no data'}. "
        "Set self.example_input_array in the module: a tensor, a tuple of arguments or a dict of "
        "keyword arguments."
    )


def largest_difference(expected: Any, actual: Any) -> float:
    """Return the largest absolute difference between the tensors of two outputs of one structure.

    NaN where exactly one of two elements is NaN; equal infinities and NaNs count as no difference.

    >>> largest_difference((torch.ones(2),), [torch.tensor([1.0, 0.5])])
    0.5
    """
    pairs = zip(_tensors(expected), _tensors(actual), strict=True)
    return max((_difference(a, b) for a, b in pairs), default=0.0)


def largest_size(outputs: Any) -> float:
    """Return the largest finite magnitude among the tensors of a model's outputs; 0 without any.

    >>> largest_size({"a": torch.tensor([1.0, -3.0, float("inf")])})
    3.0
    """
    finite = [t.detach().double().nan_to_num(0.0, 0.0, 0.0).abs() for t in _tensors(outputs)]
    return max((float(t.max()) for t in finite if t.numel()), default=0.0)


def _tensors(outputs: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _difference(expected: Tensor, actual: Tensor) -> float:
    a, b = expected.detach().double(), actual.detach().double()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, (a - b).abs()).max()) if a.numel() else 0.0


def _without_labels(call: Example) -> Example:
    return Example(call.args, {k: v for k, v in call.kwargs.items() if k not in _LABELS})


def _readings(model: nn.Module, batch: Any) -> list[Example]:
    """Return the ways in which a batch can be the arguments of forward, the likeliest first."""
    if isinstance(batch, Mapping):
        accepted = inspect.signature(model.forward).parameters
        inputs = {k: v for k, v in batch.items() if k in accepted and k not in _LABELS}
        ways = [Example((), inputs)] if inputs else []
        return [*ways, Example((), dict(batch)), Example((batch,))]
    if isinstance(batch, (tuple, list)) and batch:
        first = batch[0]
        inner = _readings(model, first) if isinstance(first, (Mapping, tuple, list)) else []
        return [*inner, Example((first,)), Example(tuple(batch[:-1])), Example(tuple(batch))]
    return [Example((batch,))]


def reason(error: BaseException) -> str:
    """Return an error's kind and what it says on one line without a terminal's codes; if long, its cause too.

    >>> reason(ValueError("no  such size."))
    'ValueError: no such size'
    """
    text = _one_line(error)
    root = error
    while root.__cause__ is not None:
        root = root.__cause__
    if len(text) > _LONGEST:
        text = text[:_LONGEST].rsplit(" ", 1)[0] + " ..."
    told = f"{type(error).__name__}: {text}".rstrip(": .")
    cause = _one_line(root)[:_LONGEST]
    if root is error or cause in told:
        return told
    return f"{told}; caused by {type(root).__name__}: {cause}".rstrip(": .")


def _one_line(error: BaseException) -> str:
    return " ".join(_CODES.sub("", str(error)).split())
