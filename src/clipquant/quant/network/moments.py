"""Second moments of the inputs that weights meet, by hooks and repeated forward passes, no tracing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.network.calibration import Calibration, Forward
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.layers import Target, is_lookup
from clipquant.quant.network.noise import Noise
from clipquant.quant.network.patches import patches, positions_of
from clipquant.quant.network.replay import Key, Replay
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.watches import Watch, watched_calls, watches_of

HESSIAN_LIMIT = 1 << 30  # bytes of one weight's second moments; above, only their diagonal is kept
_POSITIONS = 4096  # of one chunk of patches: neighbours in an image say nearly the same
_ELEMENTS = 1 << 26  # of the inputs summed over all the data, or twice the columns in positions
_WIDE = 512  # columns from which few inputs are kept in place of their moments
_FEW = 6  # as long as there are this many columns for each
_SIDE = 1024  # columns of a block of a product that is symmetric


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
        inputs: (groups, positions, columns), divided by the root of `count`: where they are few, in place
            of the hessian, which is then (groups, columns) of zeros.
        apart: The same of data held apart, by which what was fitted to these is judged.
    """

    hessian: Tensor
    goal: Tensor
    energy: Tensor
    mean: Tensor
    output: Tensor
    count: int
    noise: float = 0.0
    inputs: Tensor | None = None
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

    def __init__(self, target: Target, limit: int, few: bool) -> None:
        self.matrix = target.layout.fold(target.weight.detach()).float()
        self.limit, self.few = limit, few and self.matrix.shape[1] >= _WIDE
        self.held: list[Tensor] = []  # inputs, as long as they are few
        self.count = 0

    def add_(self, x: Tensor, f: Tensor) -> None:
        """Add the quantized network's inputs x and the float one's f, (groups, positions, columns)."""
        groups, positions, columns = x.shape
        weight = self.matrix.reshape(groups, -1, columns)
        if not self.count:
            self.full = groups * columns * columns * 4 <= self.limit
            self.hessian = x.new_zeros(groups, columns)
            self.goal = torch.zeros_like(weight)
            self.energy, self.output = x.new_zeros(2, *weight.shape[:2])
            self.mean = x.new_zeros(groups, columns)
            self.noise = Noise(x)
        y = f @ weight.mT
        self.count += positions
        if self.full or self.few:
            self.goal.baddbmm_(y.mT, x)
            self._hold_(x)
        else:
            self.hessian += x.square().sum(1)
        self.energy += y.square().sum(1)
        self.output += y.sum(1)
        self.mean += x.sum(1)

    def _hold_(self, x: Tensor) -> None:
        """Keep inputs while they are few; from then on their products alone."""
        columns = x.shape[2]
        wide = x.shape[1] < columns
        part = x if wide else x.mT @ x
        (self.noise.add_gram_ if wide else self.noise.add_)(part)
        if self.few and self.count * _FEW <= columns:
            self.held.append(x)
            return
        self.few = False
        if self.hessian.dim() == 2:
            self.hessian = x.new_zeros(x.shape[0], columns, columns)
        for held in self.held:
            add_lower_(self.hessian, held)
        self.held.clear()
        if wide:
            add_lower_(self.hessian, x)
        else:
            self.hessian += part

    def result(self) -> Moments:
        n = self.count
        inputs = torch.cat(self.held, 1) if self.held else None
        noise = 0.0
        if inputs is not None:
            noise = self.noise.share_few(inputs)
            inputs = inputs / math.sqrt(n)
        hessian = self.hessian
        if self.hessian.dim() == 3:
            mirror_(hessian)
            noise = self.noise.share(hessian)
        elif inputs is None:
            weight = self.matrix.reshape(self.goal.shape)
            self.goal = weight * hessian[:, None]
            self.energy = (self.goal * weight).sum(2)
        return Moments(
            hessian.div_(n),
            self.goal.div_(n),
            self.energy / n,
            self.mean / n,
            self.output / n,
            n,
            noise,
            inputs,
        )


def observe(
    twins: tuple[Twin, Twin],
    targets: Sequence[Target],
    calibration: Calibration,
    limit: int = HESSIAN_LIMIT,
    hold_apart: bool = False,
    few: bool = False,
    replay: Replay | None = None,
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
        few: Whether inputs that are few for their columns may be given in place of their moments.
        replay: What need not be run again.

    Returns:
        Name of a weight -> its moments; weights that no batch reaches are not in it.

    Raises:
        ValueError: If an input is NaN or infinite, naming layer and batch.
    """
    free = {t.name for t in targets if few and not is_lookup(twins[0].model, t)}
    sums = {t.name: _Sums(t, limit, t.name in free) for t in targets}
    apart = {t.name: _Sums(t, limit, t.name in free) for t in targets}
    batches, places = len(calibration), places_of(twins[0], targets)

    def visit(number: int, batch: Any) -> None:
        floats, others = inputs_met(twins, places, batch, calibration, number, replay)
        for name, inputs in others.items():
            pairs = list(zip(inputs, floats.get(name, ()), strict=False))
            met = sum(positions_of(place, x) for (place, x), _ in pairs)
            for (place, x), (_, f) in pairs:
                for a, b in zip(patches(place, x), patches(place, f), strict=True):
                    share = calibration.fitted(number) if hold_apart else 1.0
                    _add_(sums[name], apart[name], _thinned(a, b, met * batches), share)

    calibration.each(visit)
    return {
        name: replace(s.result(), apart=apart[name].result() if apart[name].count else None)
        for name, s in sums.items()
        if s.count
    }


Met: TypeAlias = dict[str, list[tuple[Target, Tensor]]]


def places_of(twin: Twin, targets: Sequence[Target]) -> list[tuple[str, Watch]]:
    """Return where a network's calls tell the inputs of some weights, by their names."""
    return [(t.name, watch) for t in targets for watch in watches_of(twin.model, t)[0]]


def inputs_met(
    twins: tuple[Twin, Twin],
    places: Sequence[tuple[str, Watch]],
    batch: Any,
    calibration: Calibration,
    number: int,
    replay: Replay | None = None,
) -> tuple[Met, Met]:
    """Return what each weight meets in the float network and in the other, driven by the float one's decisions.

    Args:
        twins: The float network, and another; the same twice is run once.
        places: Of the weights; see `places_of`.
        batch: As the calibration's loop brings it.
        calibration: How it is run.
        number: Of the batch, for messages.
        replay: What need not be run again.
    """
    exact, rounded = twins
    taken, replay = Decisions(), replay or Replay([], {})
    with taken.recorded():
        floats = _inputs(exact, places, batch, calibration.forward, replay, (0, number))
    if rounded is exact:
        return floats, floats
    with taken.followed():
        met = _inputs(rounded, places, batch, calibration.forward, replay, (1, number))
    return floats, met


def _add_(sums: _Sums, apart: _Sums, pair: tuple[Tensor, Tensor], share: float) -> None:
    """Add the first share of positions to the one and the rest to the other."""
    positions = pair[0].shape[1]
    kept = math.ceil(share * positions)
    if kept:
        sums.add_(*(part[:, :kept] for part in pair))
    if kept < positions:
        apart.add_(*(part[:, kept:] for part in pair))


def _thinned(x: Tensor, f: Tensor, met: int) -> tuple[Tensor, Tensor]:
    """Return the same evenly spaced positions of both, no more than a chunk, or all the data, can need.

    Args:
        x: (groups, positions, columns).
        f: Likewise.
        met: Positions in all, if every batch is like this one.
    """
    columns = x.shape[2]
    chunk = max(_POSITIONS, 2 * columns)
    every = max(x.shape[1] // chunk, met // max(2 * columns, _ELEMENTS // columns), 1)
    if every % 2 == 0:
        every += 1  # an odd stride meets every column of an even-sized image
    return x[:, ::every], f[:, ::every]


def add_lower_(total: Tensor, x: Tensor) -> None:
    """Add `x^T x` of (groups, positions, columns) to (groups, columns, columns), its lower part in blocks.

    What stands above the blocks on the diagonal is left as it is, for `mirror_` to fill.
    """
    for start in range(0, x.shape[2], _SIDE):
        stop = start + _SIDE
        total[:, start:stop, :stop].baddbmm_(x[:, :, start:stop].mT, x[:, :, :stop])


def mirror_(total: Tensor) -> None:
    """Fill what stands above the blocks on the diagonal of a symmetric matrix from below them."""
    for start in range(0, total.shape[2], _SIDE):
        stop = start + _SIDE
        total[:, start:stop, stop:] = total[:, stop:, start:stop].mT


def _inputs(
    twin: Twin,
    watches: Sequence[tuple[str, Watch]],
    batch: Any,
    forward: Forward,
    replay: Replay,
    key: Key,
) -> Met:
    met: Met = {}

    def see(index: int, value: Tensor) -> None:
        name, watch = watches[index]
        if not torch.isfinite(value).all():
            raise ArgumentError(
                f"the inputs of {name} hold NaN or infinity in calibration batch {key[1]}. "
                "Check the batch and the weights before this layer, or exclude the layer."
            )
        met.setdefault(name, []).append((watch.target, value.detach().clone()))

    last = replay.part_of([watch.module for _, watch in watches])
    with watched_calls([w for _, w in watches], see), replay.passing(key, last):
        twin.run(forward, batch)
    return met
