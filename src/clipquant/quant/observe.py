"""Second moments of the inputs that weights meet, by hooks and repeated forward passes, no tracing."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from clipquant.quant.layers import Target, weights_of
from clipquant.quant.patches import Reader, heads_output, patches, reader_of

Forward: TypeAlias = Callable[[nn.Module, Any], Any]

HESSIAN_LIMIT = 1 << 30  # bytes of one weight's second moments; above, only their diagonal is kept
_POSITIONS = 4096  # of one chunk of patches: neighbours in an image say nearly the same


@dataclass(frozen=True)
class Moments:
    """Second moments of a weight W's inputs, averaged over positions: all that its output error needs.

    With x the inputs in the network quantized so far and y = W f the outputs in the float one:

    Args:
        hessian: (groups, columns, columns): E[x x^T]; the weight's rows fall evenly into the groups.
            (groups, columns), the diagonal alone, where all of it would take too much memory.
        goal: (groups, rows / groups, columns): E[y x^T]; W E[x^2] with a diagonal.
        energy: (groups, rows / groups): E[y^2].
        mean: (groups, columns): E[x].
        output: (groups, rows / groups): E[y].
        count: Positions averaged over.
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor
    mean: Tensor
    output: Tensor
    count: int


class _Sums:
    """Running sums of one weight's moments."""

    def __init__(self, target: Target, limit: int) -> None:
        self.matrix = target.layout.fold(target.weight.detach()).float()
        self.limit = limit
        self.count = 0

    def add_(self, x: Tensor, f: Tensor) -> None:
        """Add the quantized network's inputs x and the float one's f, (groups, positions, columns)."""
        groups, positions, columns = x.shape
        weight = self.matrix.reshape(groups, -1, columns)
        if not self.count:
            self.full = groups * columns * columns * 4 <= self.limit
            self.hessian = (
                x.new_zeros(groups, columns, columns) if self.full else x.new_zeros(groups, columns)
            )
            self.goal = torch.zeros_like(weight)
            self.energy, self.output = x.new_zeros(2, *weight.shape[:2])
            self.mean = x.new_zeros(groups, columns)
        y = f @ weight.mT
        if self.full:
            self.hessian.baddbmm_(x.mT, x)
            self.goal.baddbmm_(y.mT, x)
        else:
            self.hessian += x.square().sum(1)
        self.energy += y.square().sum(1)
        self.output += y.sum(1)
        self.mean += x.sum(1)
        self.count += positions

    def result(self) -> Moments:
        n = self.count
        hessian = self.hessian.div_(n)
        if not self.full:
            weight = self.matrix.reshape(self.goal.shape)
            self.goal = weight * hessian[:, None] * n
            self.energy = (self.goal * weight).sum(2)
        return Moments(
            hessian, self.goal.div_(n), self.energy / n, self.mean / n, self.output / n, n
        )


@dataclass(frozen=True)
class Watch:
    """One place where a weight is used: the module whose calls tell its inputs, and how to read them."""

    module: nn.Module
    target: Target
    read: Reader


@dataclass(frozen=True)
class Use:
    """How a weight was met in one forward pass: when first, with which inputs, how often."""

    order: int
    inputs: tuple[int, ...]
    calls: int


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


def watches_of(model: nn.Module, target: Target) -> tuple[list[Watch], list[str]]:
    """Return where in `model` a weight is used, tied uses included, and why a use cannot be read."""
    projections = {
        id(m.out_proj): m for m in model.modules() if isinstance(m, nn.MultiheadAttention)
    }
    watches, reasons = [], []
    for place in _places(model, target):
        parent = projections.get(id(place.module))
        read = reader_of(place) if parent is None else partial(heads_output, parent)
        if isinstance(read, str):
            reasons.append(read)
        else:
            watches.append(Watch(place.module if parent is None else parent, place, read))
    return watches, reasons


def _places(model: nn.Module, target: Target) -> Iterator[Target]:
    """Yield each weight of `model` that is the target's tensor."""
    held = target.name.rpartition(".")
    owner = model.get_submodule(held[0])
    weight = getattr(owner, held[2])
    for place in weights_of(model):
        if place.weight is weight:
            yield place


@contextmanager
def _hooked(watches: Sequence[Watch], see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call `see(index of the watch, inputs)` at every call of a watched module."""
    busy = False

    def hook(index: int, _module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        nonlocal busy
        if busy:
            return
        busy = True  # reading an attention's heads runs it again
        try:
            see(index, watches[index].read((args, kwargs, output)))
        finally:
            busy = False

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it would pass the layers by
    handles = [
        watch.module.register_forward_hook(partial(hook, index), with_kwargs=True)
        for index, watch in enumerate(watches)
    ]
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for handle in handles:
            handle.remove()


def uses(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Forward = call_model
) -> dict[str, Use]:
    """Return how each weight that one batch reaches is used, in the order of first use.

    Weights that first meet the very same tensor, such as query, key and value, share `inputs`.
    """
    watches = [(t.name, w) for t in targets for w in watches_of(model, t)[0]]
    found: dict[str, Use] = {}
    alive: list[Tensor] = []  # keeps the identity of the inputs unique during the pass

    def see(index: int, value: Tensor) -> None:
        name = watches[index][0]
        alive.append(value)
        key = (value.data_ptr(), value._version, *value.shape)
        seen = found.get(name)
        found[name] = (
            Use(len(found), key, 1)
            if seen is None
            else Use(seen.order, seen.inputs, seen.calls + 1)
        )

    with _hooked([w for _, w in watches], see):
        forward(model, batch)
    return found


def observe(
    models: tuple[nn.Module, nn.Module],
    targets: Sequence[Target],
    batches: Sequence[Any],
    forward: Forward = call_model,
    limit: int = HESSIAN_LIMIT,
) -> dict[str, Moments]:
    """Return the moments of the inputs of some weights over all batches and all their uses.

    Args:
        models: The float network and the one quantized so far; both run each batch, in eval mode. The
            same model twice is run once.
        targets: The weights.
        batches: What `forward` takes, one after the other.
        forward: Runs a model on a batch.
        limit: Most bytes of one weight's second moments; above, only the diagonal is kept.

    Returns:
        Name of a weight -> its moments; weights that no batch reaches are not in it.

    Raises:
        ValueError: If an input is NaN or infinite, naming layer and batch.
    """
    exact, rounded = models
    sums = {t.name: _Sums(t, limit) for t in targets}
    for number, batch in enumerate(batches):
        floats = _inputs(exact, targets, batch, forward, number)
        others = floats if rounded is exact else _inputs(rounded, targets, batch, forward, number)
        for name, found in others.items():
            pairs = zip(found, floats.get(name, ()), strict=False)
            for (place, x), (_, f) in pairs:
                for a, b in zip(patches(place, x), patches(place, f), strict=True):
                    sums[name].add_(*_thinned(a, b))
    return {name: s.result() for name, s in sums.items() if s.count}


def _thinned(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same evenly spaced positions of both, no more than a chunk can need."""
    most = max(_POSITIONS, 2 * x.shape[2])
    every = max(x.shape[1] // most, 1)
    if every % 2 == 0:
        every += 1  # an odd stride meets every column of an even-sized image
    return x[:, ::every], f[:, ::every]


def _inputs(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Forward, number: int
) -> dict[str, list[tuple[Target, Tensor]]]:
    watches = [(t.name, w) for t in targets for w in watches_of(model, t)[0]]
    found: dict[str, list[tuple[Target, Tensor]]] = {}

    def see(index: int, value: Tensor) -> None:
        name, watch = watches[index]
        if not torch.isfinite(value).all():
            raise ValueError(
                f"the inputs of {name} hold NaN or infinity in calibration batch {number}. "
                "Check the batch and the weights before this layer, or exclude the layer."
            )
        found.setdefault(name, []).append((watch.target, value.detach().clone()))

    with _hooked([w for _, w in watches], see):
        forward(model, batch)
    return found
