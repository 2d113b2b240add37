"""Bits found in the middle of a fit, for the rest of it to train: the budgets are QuantizeOnFitEnd's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lightning.pytorch as pl

from clipquant.budget.chance import Judged
from clipquant.callbacks.auto import choose_bits
from clipquant.callbacks.checkpoint import logged_name
from clipquant.callbacks.road.calibration import Found, probe
from clipquant.callbacks.road.judge import judge_parts
from clipquant.callbacks.road.ranks import from_first, leaving
from clipquant.callbacks.road.road import open_road
from clipquant.callbacks.settings import Settings
from clipquant.model import QuantizedModel
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.report.record import Budget, Trial, drop_of


@dataclass(frozen=True)
class Chosen:
    """What budgets have chosen in the middle of a fit.

    Args:
        grids: State-dict key -> the grid on which the rest of the fit trains it.
        metrics: What the float network's validation logged at that time, where a drop is judged.
    """

    grids: Mapping[str, TrainedGrid]
    metrics: Mapping[str, float]


def budgets_of(trainer: pl.Trainer) -> Settings | None:
    """Return the settings of the QuantizeOnFitEnd whose budgets choose bits, if there is one."""
    found = (getattr(c, "settings", None) for c in trainer.callbacks)  # type: ignore[attr-defined]
    return next((s for s in found if isinstance(s, Settings) and s.auto), None)


def choose_grids(trainer: pl.Trainer, module: pl.LightningModule, batches: Sequence[Any]) -> Chosen:
    """Return the grids that the budgets choose for a module as it is now; the module ends as it was.

    Every process gets what the first has found.

    Args:
        trainer: In the middle of a fit.
        module: Its module, in float.
        batches: Train batches as the Trainer has prepared them.

    Raises:
        ValueError: If the budgets cannot be met by any bits, or no batch runs the module.
    """
    with leaving():
        found, error = None, None
        try:
            found = _chosen(trainer, module, batches)
        except Exception as failed:  # told by every process, or one would train on alone
            error = failed
        error = from_first(error)
        if error is not None:
            raise error
        found = from_first(found)
    if found is None:
        raise RuntimeError("the first process chose no bits.")
    return found


def _chosen(trainer: pl.Trainer, module: pl.LightningModule, batches: Sequence[Any]) -> Chosen:
    settings = budgets_of(trainer)
    if settings is None:  # refused before the fit
        raise RuntimeError("no QuantizeOnFitEnd has budgets.")
    found = Found(batches, f"{len(batches)} batches of the training so far")

    with open_road(trainer, module, lambda road: probe(road, batches), before=True) as road:
        before = Judged({})
        if settings.max_drop is not None:
            before = judge_parts(road, settings.watch(trainer, {}).name, None, apart=True)
        goal = settings.goal(trainer, road.natures)
        # Dense codes keep their bytes whatever training makes of them; those of an entropy code would not.
        goal = replace(goal, monitor=logged_name(goal.monitor, before.metrics), coding="dense")
        made = choose_bits(road, goal, found, before)
    grids = {n: TrainedGrid(t.grid, t.bits, t.layout) for n, t in made.weights.tensors.items()}
    return Chosen(grids, before.metrics)


def budgeted(
    made: QuantizedModel, settings: Settings, before: Mapping[str, float]
) -> QuantizedModel:
    """Return a model that was trained on chosen bits, with what that means for the budgets.

    Args:
        made: The model, judged.
        settings: The budgets.
        before: The float network's metrics when the bits were chosen.
    """
    report, most = made.report, settings.most_bytes(made.report)
    value = report.quantized_metrics.get(report.monitor or "")
    missed = []
    if most is not None and report.size_bytes > most:
        missed.append(f"the file takes {report.size_bytes:,} bytes, more than {most:,}")
    first = before.get(report.monitor or "")
    if settings.max_drop is not None and value is not None and first is not None:
        drop = drop_of(first, value, report.mode or "min")
        if drop > settings.max_drop + 1e-9:
            missed.append(
                f"{report.monitor} is {drop:.4g} worse than that of the float network when its bits were chosen"
            )
    trial = Trial(report.size_bytes, value, "trained", True)
    return made.reported(budget=Budget(settings.max_drop, most, (trial,), "; ".join(missed)))
