"""What is done when a fit has ended: every step has a fallback, and the file comes before all that only tells of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from clipquant.artifact import read_metadata
from clipquant.budget.chance import Judged, drop_between
from clipquant.callbacks.auto import choose_bits
from clipquant.callbacks.checkpoint import load_best, logged_name
from clipquant.callbacks.export import export_files
from clipquant.callbacks.failures import Failure, Failures
from clipquant.callbacks.folder import FILE
from clipquant.callbacks.ladder import Rung, climb_down, data_free_rungs
from clipquant.callbacks.loggers import log_report
from clipquant.callbacks.qat_auto import budgeted
from clipquant.callbacks.rehearsal import FINDING
from clipquant.callbacks.road.calibration import (
    Found,
    find_batches,
    loop_on,
    probe,
    run_prepared,
)
from clipquant.callbacks.road.judge import judge_parts
from clipquant.callbacks.road.logged import Natures
from clipquant.callbacks.road.road import Road, open_road
from clipquant.callbacks.screen import display
from clipquant.callbacks.settings import Settings
from clipquant.callbacks.takeover import SAID, no_grids, take_from_checkpoint_
from clipquant.callbacks.watch import Watch
from clipquant.model import QuantizedModel
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.state import kept, seeded
from clipquant.quant.recipe import Recipe
from clipquant.report.files import write_report
from clipquant.report.record import Budget, QuantizationReport
from clipquant.report.table import print_summary

Quantize = Callable[[Recipe, Any, Calibration | None], QuantizedModel]


@dataclass(frozen=True)
class Outcome:
    """What came of a fit's end.

    Args:
        made: The quantized weights, where there is a file that holds them.
        report: What was gained and what it cost; None where nothing could be quantized.
        path: The file.
        failures: The steps that failed, in words.
        budget: Why a budget was missed; empty where all are met.
    """

    made: QuantizedModel | None = None
    report: QuantizationReport | None = None
    path: Path | None = None
    failures: tuple[Failure, ...] = ()
    budget: str = ""


class FitEnd:
    """One fit's end: the steps in their order, on the road of one module.

    Args:
        settings: What the callback was asked.
        trainer: The Trainer that has fitted.
        folder: Where files go.
        quantize: Returns a module quantized by a recipe.
        told: Steps that the user has been warned of before training.
    """

    def __init__(
        self,
        settings: Settings,
        trainer: pl.Trainer,
        folder: Path,
        quantize: Quantize,
        told: frozenset[str] = frozenset(),
    ) -> None:
        self.settings, self.trainer, self.folder = settings, trainer, folder
        self.saved: Path | None = None
        self.quantize, self.failures = quantize, Failures(told_before=told)

    def run(self, module: pl.LightningModule) -> Outcome:
        """Return what came of it; the module ends as it was."""
        made: QuantizedModel | None = None
        path: Path | None = None
        with (
            display(self.trainer) as tell,
            open_road(self.trainer, module, probe, tell=tell) as road,
        ):
            self._take_best_(road)
            before = self._judged(road, None, "float")
            found = self._batches(road)
            rungs = list(self._rungs(road, found, before))
            made = climb_down(rungs, road.guest, self.failures, self.settings.line)
            if made is not None:
                made = self._reported(road, self._coded(made), before)
                if self.settings.auto and self.settings.recipe.trained:
                    made = budgeted(made, self.settings, self.settings.float_metrics)
                made, path = self._saved(made)
                made = self._completed(road, found, made, path)
        return self._ended(made, path)

    def run_apart(self, made: QuantizedModel) -> Outcome:
        """Return what came of weights that were quantized a layer at a time: nothing is run on them."""
        made = self._reported(None, self._coded(made), Judged({}))
        made, path = self._saved(made)
        return self._ended(made.reported(failures=self.failures.told()), path)

    def _ended(self, made: QuantizedModel | None, path: Path | None) -> Outcome:
        if made is None:
            return Outcome(failures=tuple(self.failures.items))
        self._tell_(made.report, path)
        budget = "" if made.report.budget is None else made.report.budget.failure
        held = None if path is None else made
        return Outcome(held, made.report, path, tuple(self.failures.items), budget)

    def _take_best_(self, road: Road) -> None:
        if self.settings.weights == "best" and not getattr(self.trainer, "fast_dev_run", False):
            with self.failures.step(
                "loading the best checkpoint",
                "the weights at the end of the fit are quantized",
                "clipquant.quantize(Net.load_from_checkpoint(path)) quantizes it later.",
            ):
                name = self.settings.watch(self.trainer, {}).name
                checkpoint = load_best(self.trainer, road.guest, name)
                if self.settings.recipe.trained:
                    self._take_grids_(take_from_checkpoint_(road.guest, checkpoint))

    def _take_grids_(self, trained: Mapping[str, TrainedGrid]) -> None:
        """Take the best checkpoint's grids; one of before the training was quantized has none."""
        recipe = replace(self.settings.recipe, trained=trained)
        self.settings = replace(self.settings, recipe=recipe)
        if not trained:
            self.failures.add_(no_grids(recipe.method))

    def _judged(self, road: Road, state: Mapping[str, Tensor] | None, which: str) -> Judged:
        """Return what was judged of some weights; of the monitored metric in parts too, where a search asks."""
        monitor = self.settings.watch(self.trainer, road.natures).name
        what = f"judging the {which} weights"
        with self.failures.step(
            f"judging the {which} weights",
            f"the report has no {which} metrics",
            "Run trainer.validate(module) to see the error by itself.",
        ):
            return judge_parts(road, monitor, state, apart=self.settings.auto, what=what)
        return Judged({})

    def _batches(self, road: Road) -> Found | None:
        """Return calibration batches; without any that can be run, weights are quantized without data."""
        wanted = self.settings.wants_data(road.guest)
        found: Found | None = None
        try:
            found = find_batches(road, max(self.settings.calibration_batches, 1))
        except Exception as error:
            if wanted:
                self.failures.add_(
                    Failure(
                        "finding batches to calibrate on",
                        f"{type(error).__name__}: {error}",
                        "the weights are quantized without data",
                        "Let validation_step take batches of the train or validation dataloader, or set "
                        "calibration_batches=0.",
                    )
                )
        return found

    def _rungs(self, road: Road, found: Found | None, before: Judged) -> list[Rung]:
        """Return the ways to quantize, the one asked for first."""
        settings, recipe, guest = self.settings, self.settings.recipe, road.guest
        data = None
        if found is not None and settings.wants_data(guest):
            data = Calibration(found.batches, run_prepared, road.tell, loop=loop_on(found.on(road)))
        rungs: list[Rung] = []
        if recipe.trained and data is None:
            return [
                Rung("taking over trained grids", lambda: self._taken(road)),
                *data_free_rungs(settings, guest, self.quantize),
            ]
        if settings.auto:
            rungs = [] if found is None else self._by_budgets(road, found, before)
        elif data is not None:
            what = f"{found.what}{_refused(found)}" if found is not None else ""
            rungs.append(
                Rung(
                    f"quantizing by method={recipe.method!r}",
                    lambda: self.quantize(recipe, guest, data).reported(calibration=what),
                )
            )
        return rungs + data_free_rungs(settings, guest, self.quantize)

    def _taken(self, road: Road) -> QuantizedModel:
        return self.quantize(self.settings.recipe, road.guest, None).reported(calibration=SAID)

    def _by_budgets(self, road: Road, found: Found, before: Judged) -> list[Rung]:
        """Return the ways that search: by all budgets where they can be judged, then by the size alone."""
        goal = self.settings.goal(self.trainer, road.natures)
        goal = replace(goal, monitor=logged_name(goal.monitor, before.metrics))
        by = self.settings.watch(self.trainer, road.natures)
        if by.mode is None:
            before = Judged({})
        alone = replace(goal, max_drop=None, confidence=None)
        judged = goal.max_drop is None or goal.monitor in before.metrics
        rungs: list[Rung] = []
        if judged:
            what = "choosing bits by the budgets"
            rungs.append(Rung(what, lambda: choose_bits(road, goal, found, before, road.tell)))
        elif before.metrics:
            self.failures.add_(
                Failure(
                    "keeping max_drop",
                    f"it watches {goal.monitor!r}, which was never logged in validation; logged were "
                    f"{', '.join(sorted(before.metrics))}",
                    "it was not judged",
                    "Set monitor to one of them.",
                )
            )
        if goal.max_drop is not None and goal.max_size is not None:
            what = "choosing bits by the size alone"
            given = goal.max_drop
            rungs.append(
                Rung(
                    what,
                    lambda: _missing(choose_bits(road, alone, found, Judged({}), road.tell), given),
                )
            )
        return rungs

    def _coded(self, made: QuantizedModel) -> QuantizedModel:
        """Return a model whose file holds codes as was asked."""
        if self.settings.coding == "dense":
            return made
        with self.failures.step(
            "entropy coding",
            "the file holds dense codes",
            "load_quantized and QuantizedModel.save(path, coding='entropy') make it smaller later.",
        ):
            return made.coded(self.settings.coding)
        return made

    def _reported(self, road: Road | None, made: QuantizedModel, before: Judged) -> QuantizedModel:
        by = self._watched({} if road is None else road.natures, before.metrics)
        known: dict[str, Any] = {"seed": self.settings.seed, "mode_from": by.why}
        if not made.report.float_metrics:  # the search for a budget has judged already
            metrics, after = before.metrics, Judged({})
            if road is not None and metrics:
                after = self._judged(road, made.state_dict(), "quantized")
            name = logged_name(by.name, metrics) if by.mode else None
            known |= {
                "float_metrics": metrics,
                "quantized_metrics": after.metrics,
                "monitor": name,
                "mode": by.mode,
            }
            if name is not None and name in metrics and by.mode is not None:
                drop = drop_between(before, after, name, by.mode)
                known["drop_error"] = drop.shown_error
        return made.reported(**known, failures=self.failures.told())

    def _watched(self, natures: Natures, before: Mapping[str, float]) -> Watch:
        """Return which metric judges; what keeps it from judging is a failure."""
        by = self.settings.watch(self.trainer, natures)
        logged = logged_name(by.name, before) in before
        if before and not logged and self.settings.monitor is not None:
            said = f"it is {by.name!r}, which validation did not log; logged were {', '.join(sorted(before))}"
            remedy = "Set monitor to one of them."
            self.failures.add_(Failure(FINDING, said, "no metric judges the file", remedy))
        elif logged and by.mode is None:
            self.failures.add_(
                Failure("judging", by.unknown, "no metric judges the file", by.remedy)
            )
        return by

    def _saved(self, made: QuantizedModel) -> tuple[QuantizedModel, Path | None]:
        path = self.folder / FILE
        saved: Path | None = None
        with self.failures.step(
            f"writing {path}",
            "the module keeps its float weights, and checkpoints are untouched",
            f"Make room, then: {self.settings.line(str(path))}",
        ):
            if self.trainer.is_global_zero:
                path.parent.mkdir(parents=True, exist_ok=True)
                with (
                    warnings.catch_warnings()
                ):  # of a file larger than the floats, which the report says
                    warnings.simplefilter("ignore", UserWarning)
                    made.save(path)
                report = replace(made.report, path=str(path), sha256=read_metadata(path)["sha256"])
                made = replace(made, report=report)
            saved = self.saved = path
        if saved is not None and self.trainer.is_global_zero:
            # What is told of the file stands beside it from now on; what is measured later is added.
            with self.failures.step(
                "writing the report", "an older one stays", "clipquant report FILE shows it."
            ):
                write_report(made.report, path.parent)
        return made, saved

    def _completed(
        self, road: Road, found: Found | None, made: QuantizedModel, path: Path | None
    ) -> QuantizedModel:
        """Add the exports beside the file."""
        exports: tuple[dict[str, Any], ...] = ()
        if path is not None:
            with (
                self.failures.step(
                    "exporting",
                    "the artifact is whole without",
                    "clipquant export makes formats from it later.",
                ),
                kept(road.guest),
                seeded(0),
            ):
                records = export_files(
                    road,
                    found,
                    made,
                    self.settings.export if self.trainer.is_global_zero else (),
                    path.parent,
                    max_drop=self.settings.max_drop,
                    ranges=self.settings.ranges,
                )
                exports = tuple(record.to_dict() for record in records)
        report = replace(made.report, exports=exports, failures=self.failures.told())
        return replace(made, report=report)

    def _tell_(self, report: QuantizationReport, path: Path | None) -> None:
        if not self.trainer.is_global_zero:
            return
        later = "The artifact is whole; clipquant report FILE shows it."
        if path is not None:
            with self.failures.step("writing the report", "the fit ends without it", later):
                write_report(report, path.parent)
        with self.failures.step("logging", "the loggers miss its figures", later):
            log_report(report, self.trainer.loggers, self.trainer.global_step)
        with self.failures.step("printing the summary", "the fit ends without it", later):
            print_summary(report, self._said(report))

    def _said(self, report: QuantizationReport) -> tuple[str, ...]:
        """Return the worries that are told as warnings."""
        missed = "" if report.budget is None else report.budget.failure
        return tuple(filter(None, (*self.failures.told(), missed, report.suspicion)))


def _missing(made: QuantizedModel, max_drop: float) -> QuantizedModel:
    """Return a model chosen by its size, with a budget that says what was not judged."""
    budget = made.report.budget or Budget()
    said = "; ".join(filter(None, (budget.failure, "max_drop could not be judged")))
    return made.reported(budget=replace(budget, max_drop=max_drop, failure=said))


def _refused(found: Found) -> str:
    return f" (not of others: {'; '.join(found.refused)})"[:300] if found.refused else ""
