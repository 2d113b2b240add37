"""Second moments of the inputs that weights meet, by hooks and repeated forward passes, no tracing."""

from __future__ import annotations

import math
from collections.abc import Container, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clipquant.errors import ArgumentError
from clipquant.quant.network.calibration import Calibration, Forward
from clipquant.quant.network.decisions import Decisions
from clipquant.quant.network.devices import moved
from clipquant.quant.network.layers import Target, is_lookup
from clipquant.quant.network.patches import patches, positions_of
from clipquant.quant.network.replay import Key, Replay
from clipquant.quant.network.sums import Moments as Moments
from clipquant.quant.network.sums import Sums
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.watches import Watch, watched_calls, watches_of

HESSIAN_LIMIT = 1 << 30  # bytes of one weight's second moments; above, only their diagonal is kept
_POSITIONS = 4096  # of one chunk of patches: neighbours in an image say nearly the same
_ELEMENTS = 1 << 26  # of the inputs summed over all the data, or twice the columns in positions


class Finite:
    """Whether the inputs met are finite: noted where they lie, read out once."""

    def __init__(self) -> None:
        self.places: list[tuple[str, int]] = []
        self.flags: list[Tensor] = []

    def add_(self, name: str, batch: int, value: Tensor) -> None:
        """Note what a weight has met in a batch."""
        self.places.append((name, batch))
        self.flags.append(torch.isfinite(value).all())

    def check(self) -> None:
        """Raise for the first inputs that were not finite.

        Raises:
            ValueError: Naming layer and batch.
        """
        if not self.flags:
            return
        good = torch.stack(self.flags).tolist()
        if not all(good):
            name, batch = self.places[good.index(False)]
            raise ArgumentError(
                f"the inputs of {name} hold NaN or infinity in calibration batch {batch}. "
                "Check the batch and the weights before this layer, or exclude the layer."
            )


def observe(
    twins: tuple[Twin, Twin],
    targets: Sequence[Target],
    calibration: Calibration,
    limit: int = HESSIAN_LIMIT,
    hold_apart: bool = False,
    few: bool = False,
    replay: Replay | None = None,
    sums_on: torch.device | None = None,
    alone: Container[str] = (),
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
        alone: Names of weights whose wanted outputs are those for the quantized network's inputs: what these
            are off by is made up for elsewhere.
        sums_on: Where moments are added up; None: where the inputs are.

    Returns:
        Name of a weight -> its moments; weights that no batch reaches are not in it.

    Raises:
        ValueError: If an input is NaN or infinite, naming layer and batch.
    """
    free = {t.name for t in targets if few and not is_lookup(twins[0].model, t)}
    sums = {t.name: Sums(t, limit, t.name in free) for t in targets}
    apart = {t.name: Sums(t, limit, t.name in free) for t in targets}
    batches, places, checks = len(calibration), places_of(twins[0], targets), Finite()

    def visit(number: int, batch: Any) -> None:
        floats, others = inputs_met(twins, places, batch, calibration, number, checks, replay)
        for name, inputs in others.items():
            wanted = inputs if name in alone else floats.get(name, ())
            pairs = list(zip(inputs, wanted, strict=False))
            met = sum(positions_of(place, x) for (place, x), _ in pairs)
            for (place, x), (_, f) in pairs:
                for a, b in zip(patches(place, x), patches(place, f), strict=True):
                    share = calibration.fitted(number) if hold_apart else 1.0
                    thin = _thinned(a, b, met * batches)
                    _add_(sums[name], apart[name], moved(thin, sums_on or a.device), share)

    calibration.each(visit)
    checks.check()
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
    checks: Finite,
    replay: Replay | None = None,
) -> tuple[Met, Met]:
    """Return what each weight meets in the float network and in the other, driven by the float one's decisions.

    Args:
        twins: The float network, and another; the same twice is run once.
        places: Of the weights; see `places_of`.
        batch: As the calibration's loop brings it.
        calibration: How it is run.
        number: Of the batch, for messages.
        checks: Told of all that is met.
        replay: What need not be run again.
    """
    exact, rounded = twins
    taken, replay = Decisions(), replay or Replay([], {})
    with taken.recorded():
        floats = _inputs(exact, places, batch, calibration.forward, replay, (0, number), checks)
    if rounded is exact:
        return floats, floats
    with taken.followed():
        met = _inputs(rounded, places, batch, calibration.forward, replay, (1, number), checks)
    return floats, met


def _add_(sums: Sums, apart: Sums, pair: tuple[Tensor, Tensor], share: float) -> None:
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


def _inputs(
    twin: Twin,
    watches: Sequence[tuple[str, Watch]],
    batch: Any,
    forward: Forward,
    replay: Replay,
    key: Key,
    checks: Finite,
) -> Met:
    met: Met = {}

    def see(index: int, value: Tensor) -> None:
        name, watch = watches[index]
        checks.add_(name, key[1], value)
        met.setdefault(name, []).append((watch.target, value.detach().clone()))

    last = replay.part_of([watch.module for _, watch in watches])
    with watched_calls([w for _, w in watches], see), replay.passing(key, last):
        twin.run(forward, batch)
    return met
