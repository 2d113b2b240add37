"""The time of a step before and after quantizing, both measured in turn on the Trainer's own data."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from clipquant.callbacks.road.calibration import Found, Prepared, loop_on, run_prepared
from clipquant.callbacks.road.judge import weights
from clipquant.callbacks.road.loss import samples_of
from clipquant.callbacks.road.road import Road
from clipquant.quant.network.calibration import EndLoop
from clipquant.report.record import Latency

SECONDS = 2.0  # to spend on it, about
_LEAST, _MOST = 3, 30


def measure_latency(road: Road, state: Mapping[str, Tensor], found: Found) -> Latency:
    """Return the median time of a step of the guest, with its own weights and with others.

    The step is `validation_step`, or `forward` without one, on one batch. The first call of each warms
    up and is not counted.

    Args:
        road: The road; its guest ends as it was.
        state: The weights to compare with.
        found: Batches that the step takes.
    """
    times: tuple[list[float], list[float]] = ([], [])
    size = 0

    def visit(_: int, prepared: Prepared) -> None:
        nonlocal size
        size = samples_of(prepared.args)
        _measure_(road, prepared, state, times)
        raise EndLoop

    loop_on(found.on(road))(found.batches, [0], visit)
    before, after = (1e3 * statistics.median(own[1:]) for own in times)
    what = "validation_step" if found.on(road).by_step else "forward"
    return Latency(before, after, size, torch.get_num_threads(), what)


def _measure_(
    road: Road, prepared: Prepared, state: Mapping[str, Tensor], times: tuple[list[float], ...]
) -> None:
    spent, count = 0.0, 0
    while count <= _LEAST or (spent < SECONDS and count <= _MOST):
        for held, own in zip((None, state), times, strict=True):
            with weights(road.guest, held), torch.no_grad():
                start = time.perf_counter()
                run_prepared(road.guest, prepared)
                own.append(time.perf_counter() - start)
            spent += own[-1]
        count += 1
