"""Bits chosen for a trained module: sensitivities from its own training data, its own metric as judge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from typing import Any

from torch import Tensor

from clipquant.budget.chance import Judged
from clipquant.callbacks.road.calibration import SOURCES, Found, loop_on, run_prepared
from clipquant.callbacks.road.judge import judge_parts
from clipquant.callbacks.road.loss import Loss
from clipquant.callbacks.road.road import Road
from clipquant.model import QuantizedModel
from clipquant.model.auto import AutoBits, Seen, quantize_auto
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.network.calibration import Calibration, Progress
from clipquant.quant.network.layers import Target
from clipquant.quant.widths.sensitivity import believed_gradients


def choose_bits(
    road: Road,
    goal: AutoBits,
    found: Found,
    before: Judged,
    progress: Progress | None = None,
) -> QuantizedModel:
    """Return a module with the bits that meet a goal.

    Args:
        road: The road; its guest ends as it was.
        goal: What is asked.
        found: Batches that the guest's step takes.
        before: What was judged of the float module; no metric: only a size can be met.
        progress: Told before each weight.

    Raises:
        ValueError: If there is no training data, or the goal cannot be asked.
    """
    targets = goal.recipe.select(road.guest).targets
    if progress is not None:
        progress("sensitivities", 0, len(targets))
    fisher, what = sensitivities(road, targets, found)
    trials = count(1)

    def measure(weights: QuantizedWeights) -> Judged:
        what = f"bits for the budget, trial {next(trials)}"
        return judge_parts(road, goal.monitor, weights.state_dict(), apart=True, what=what)

    calibration = Calibration(found.batches, run_prepared, progress, loop=loop_on(found.on(road)))
    judged = measure if before.metrics else None
    quantized = quantize_auto(road.guest, goal, Seen(fisher, calibration), before, judged)
    return quantized.reported(calibration=f"{found.what}, by the {what}")


def sensitivities(
    road: Road, targets: Sequence[Target], found: Found
) -> tuple[dict[str, Tensor], str]:
    """Return E[g^2] of each weight and by which loss: on batches as `training_step` gets them, where it takes them.

    Args:
        road: The road.
        targets: The weights.
        found: Batches that the guest's validation step takes, for the divergence of outputs.
    """
    loss = Loss()
    train = [] if road.before else SOURCES[0].batches(road, len(found.batches))
    if train:
        try:
            return _squared(road, targets, train, loss), loss.what
        except Exception as error:  # the steps may not take these batches at all
            loss = Loss(f"divergence of the outputs ({type(error).__name__}: {error})"[:160])
    return _squared(found.on(road), targets, found.batches, loss), loss.what


def _squared(
    road: Road, targets: Sequence[Target], batches: Sequence[Any], loss: Loss
) -> dict[str, Tensor]:
    calibration = Calibration(batches, run_prepared, loop=loop_on(road))
    return believed_gradients(road.guest, targets, calibration, loss)
