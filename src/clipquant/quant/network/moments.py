"""Second moments of the inputs that weights meet, by hooks and repeated forward passes, no tracing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from clipquant.errors import ArgumentError, RunError
from clipquant.quant.network.calibration import Calibration, EndLoop, Forward
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.layers import Target, weights_of
from clipquant.quant.network.patches import Reader, heads_output, patches, reader_of
from clipquant.quant.network.twin import Twin

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
        noise: Share of the hessian's square off its diagonal that is chance, by how much it differs
            from piece to piece of the data: 1 where too few were seen to know anything.
        apart: The same of data held apart, by which what was fitted to these is judged.
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor
    mean: Tensor
    output: Tensor
    count: int
    noise: float = 0.0
    apart: Moments | None = None

    def means(self) -> tuple[Tensor, Tensor]:
        """Return E[x] and E[y] over all data, those held apart included."""
        if self.apart is None:
            return self.mean, self.output
        share = self.apart.count / (self.count + self.apart.count)
        mean = torch.lerp(self.mean, self.apart.mean, share)
        return mean, torch.lerp(self.output, self.apart.output, share)


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
            self.noise = _Noise(x)
        y = f @ weight.mT
        if self.full:
            self._add_hessian_(x)
            self.goal.baddbmm_(y.mT, x)
        else:
            self.hessian += x.square().sum(1)
        self.energy += y.square().sum(1)
        self.output += y.sum(1)
        self.mean += x.sum(1)
        self.count += positions

    def _add_hessian_(self, x: Tensor) -> None:
        if x.shape[1] < x.shape[2]:
            self.hessian.baddbmm_(x.mT, x)
            self.noise.add_gram_(x)
        else:
            part = x.mT @ x
            self.hessian += part
            self.noise.add_(part)

    def result(self) -> Moments:
        n = self.count
        noise = self.noise.share(self.hessian) if self.full else 0.0
        hessian = self.hessian.div_(n)
        if not self.full:
            weight = self.matrix.reshape(self.goal.shape)
            self.goal = weight * hessian[:, None] * n
            self.energy = (self.goal * weight).sum(2)
        return Moments(
            hessian, self.goal.div_(n), self.energy / n, self.mean / n, self.output / n, n, noise
        )


class _Noise:
    """How much the off-diagonal part of second moments differs from piece to piece of the data.

    Columns are scaled to like size, so that loud inputs do not drown quiet ones.

    Source:
        Schaefer and Strimmer 2005, "A shrinkage approach to large-scale covariance matrix estimation",
        with pieces of the data, whose positions may be alike, in place of single positions.
    """

    def __init__(self, first: Tensor) -> None:
        size = first.square().mean(1, keepdim=True)  # (groups, 1, columns)
        self.scale = torch.where(size > 0, size, torch.inf).rsqrt()
        self.pieces, self.squares, self.single = 0, 0.0, 0.0

    def add_(self, part: Tensor) -> None:
        """Add a piece by its sum of x x^T, (groups, columns, columns)."""
        self._count_(_off_diagonal(part * self.scale * self.scale.mT))

    def add_gram_(self, x: Tensor) -> None:
        """Add a piece by its inputs, (groups, positions, columns), fewer than there are columns."""
        scaled = x * self.scale
        squares = scaled.square()
        lengths = squares.sum(2).square().sum() - squares.square().sum()
        self.single += float(lengths)  # each position as a piece of its own
        gram = scaled @ scaled.mT
        self._count_(gram.square().sum() - squares.sum(1).square().sum())

    def _count_(self, square: Tensor) -> None:
        self.pieces += 1
        self.squares += float(square)

    def share(self, total: Tensor) -> float:
        """Return the part of the square of the sum over all pieces that is chance."""
        whole = float(_off_diagonal(total * self.scale * self.scale.mT))
        if whole <= 0:
            return 0.0
        if self.pieces == 1:
            return min(self.single / whole, 1.0)
        spread = (self.squares - whole / self.pieces) * self.pieces / (self.pieces - 1)
        return min(max(spread / whole, 0.0), 1.0)


def _off_diagonal(matrix: Tensor) -> Tensor:
    """Return the sum of the squares off the diagonal of (groups, columns, columns)."""
    return matrix.square().sum() - matrix.diagonal(dim1=1, dim2=2).square().sum()


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


def uses(targets: Sequence[Target], model: nn.Module, calibration: Calibration) -> dict[str, Use]:
    """Return how each weight that the data reach is used, in the order of first use.

    As few batches are run as it takes to meet every weight whose inputs can be read. Weights that
    first meet the very same tensor, such as query, key and value, share `inputs`.

    Args:
        targets: The weights.
        model: Holds them; runs each batch.
        calibration: Batches, and how to run them.

    Raises:
        RuntimeError: If the model raises, naming the batch.
    """
    seen: dict[str, Use] = {}
    missing = [t for t in targets if watches_of(model, t)[0]]

    def visit(number: int, batch: Any) -> None:
        nonlocal missing
        try:
            met = _uses(model, missing, batch, calibration.forward)
        except (ValueError, RuntimeError, TypeError, KeyError, IndexError) as error:
            raise RunError(
                f"the model could not run on calibration batch {number} "
                f"({type(batch).__name__}): {type(error).__name__}: {error}. A dict is passed as keywords, "
                "a tuple as positional arguments, anything else as the one input."
            ) from error
        seen.update({k: replace(u, order=u.order + len(seen)) for k, u in met.items()})
        missing = [t for t in missing if t.name not in seen]
        if not missing:
            raise EndLoop

    calibration.each(visit)
    return seen


def _uses(
    model: nn.Module, targets: Sequence[Target], batch: Any, forward: Forward
) -> dict[str, Use]:
    """Return how each weight that one batch reaches is used."""
    watches = [(t.name, w) for t in targets for w in watches_of(model, t)[0]]
    met: dict[str, Use] = {}
    alive: list[Tensor] = []  # keeps the identity of the inputs unique during the pass

    def see(index: int, value: Tensor) -> None:
        name = watches[index][0]
        alive.append(value)
        key = (value.data_ptr(), value._version, *value.shape)
        first = met.get(name)
        met[name] = (
            Use(len(met), key, 1) if first is None else replace(first, calls=first.calls + 1)
        )

    with _hooked([w for _, w in watches], see):
        forward(model, batch)
    return met


def observe(
    twins: tuple[Twin, Twin],
    targets: Sequence[Target],
    calibration: Calibration,
    limit: int = HESSIAN_LIMIT,
    hold_apart: bool = False,
) -> dict[str, Moments]:
    """Return the moments of the inputs of some weights over all batches and all their uses.

    Args:
        twins: The float network and the one quantized so far; both run each batch, in eval mode. The
            same twin twice is run once.
        targets: The weights.
        calibration: Batches, one after the other, and how to run them.
        limit: Most bytes of one weight's second moments; above, only the diagonal is kept.
        hold_apart: Whether a quarter of the data goes into `Moments.apart`: the batches held apart, or
            where there are too few of them the last samples of each.

    Returns:
        Name of a weight -> its moments; weights that no batch reaches are not in it.

    Raises:
        ValueError: If an input is NaN or infinite, naming layer and batch.
    """
    exact, rounded = twins
    sums = {t.name: _Sums(t, limit) for t in targets}
    apart = {t.name: _Sums(t, limit) for t in targets}

    def visit(number: int, batch: Any) -> None:
        taken = Decisions()
        with taken.recorded():
            floats = _inputs(exact, targets, batch, calibration.forward, number)
        others = floats
        if rounded is not exact:
            with taken.followed():
                others = _inputs(rounded, targets, batch, calibration.forward, number)
        for name, inputs in others.items():
            pairs = zip(inputs, floats.get(name, ()), strict=False)
            for (place, x), (_, f) in pairs:
                for a, b in zip(patches(place, x), patches(place, f), strict=True):
                    share = calibration.fitted(number) if hold_apart else 1.0
                    _add_(sums[name], apart[name], _thinned(a, b), share)

    calibration.each(visit)
    return {
        name: replace(s.result(), apart=apart[name].result() if apart[name].count else None)
        for name, s in sums.items()
        if s.count
    }


def _add_(sums: _Sums, apart: _Sums, pair: tuple[Tensor, Tensor], share: float) -> None:
    """Add the first share of positions to the one and the rest to the other."""
    positions = pair[0].shape[1]
    kept = math.ceil(share * positions)
    if kept:
        sums.add_(*(part[:, :kept] for part in pair))
    if kept < positions:
        apart.add_(*(part[:, kept:] for part in pair))


def _thinned(x: Tensor, f: Tensor) -> tuple[Tensor, Tensor]:
    """Return the same evenly spaced positions of both, no more than a chunk can need."""
    most = max(_POSITIONS, 2 * x.shape[2])
    every = max(x.shape[1] // most, 1)
    if every % 2 == 0:
        every += 1  # an odd stride meets every column of an even-sized image
    return x[:, ::every], f[:, ::every]


def _inputs(
    twin: Twin, targets: Sequence[Target], batch: Any, forward: Forward, number: int
) -> dict[str, list[tuple[Target, Tensor]]]:
    watches = [(t.name, w) for t in targets for w in watches_of(twin.model, t)[0]]
    met: dict[str, list[tuple[Target, Tensor]]] = {}

    def see(index: int, value: Tensor) -> None:
        name, watch = watches[index]
        if not torch.isfinite(value).all():
            raise ArgumentError(
                f"the inputs of {name} hold NaN or infinity in calibration batch {number}. "
                "Check the batch and the weights before this layer, or exclude the layer."
            )
        met.setdefault(name, []).append((watch.target, value.detach().clone()))

    with _hooked([w for _, w in watches], see):
        twin.run(forward, batch)
    return met
