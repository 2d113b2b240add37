"""What QuantizeOnFitEnd was asked, as one frozen record that its steps read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import lightning.pytorch as pl
from torch import nn

from clipquant.budget.goal import size_in_bytes
from clipquant.callbacks.road.logged import Natures
from clipquant.callbacks.watch import Watch, watch
from clipquant.export import Format
from clipquant.model import QuantizedModel
from clipquant.model.auto import AutoBits
from clipquant.quant.codes.coding import Coding
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.recipe import Recipe
from clipquant.report.record import Budget, QuantizationReport, Trial


@dataclass(frozen=True)
class Settings:
    """The arguments of a QuantizeOnFitEnd, checked.

    Args:
        recipe: How weights are quantized; its bits are those of the fallback where `auto`.
        auto: Whether bits are chosen by budgets.
        calibration_batches: How many batches calibrate; 0: data-free.
        max_drop: Most that the monitored metric may lose.
        max_size: Most bytes of the file.
        monitor: The metric that judges.
        mode: Which way it is better.
        weights: "last" or "best".
        export: Further formats.
        confidence: How sure it must be that `max_drop` is kept; None: within one standard error.
        coding: How the file holds codes.
        float_metrics: What the float network's validation logged where bits were chosen during the fit.
    """

    recipe: Recipe
    auto: bool
    calibration_batches: int
    max_drop: float | None
    max_size: int | float | str | None
    monitor: str | None
    mode: str | None
    weights: str
    export: tuple[Format, ...]
    confidence: float | None = None
    coding: Coding = "dense"
    float_metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def plain(self) -> Recipe:
        """The recipe of the best method that needs no data."""
        return self.recipe.without_data()

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """Name of a weight -> the ends of its layer's inputs, where they were trained."""
        trained = self.recipe.trained.items()
        return {name: grid.inputs for name, grid in trained if grid.inputs is not None}

    @property
    def seed(self) -> int | None:
        """The run's seed, where one was set."""
        seed = os.environ.get("PL_GLOBAL_SEED")
        return int(seed) if seed else None

    def taking_over(
        self, trained: Mapping[str, TrainedGrid], before: Mapping[str, float]
    ) -> Settings:
        """Return the same settings, with the grids that training has left and the metrics of before."""
        if not trained:
            return self
        return replace(self, recipe=replace(self.recipe, trained=trained), float_metrics=before)

    def wants_data(self, module: nn.Module) -> bool:
        """Return whether batches make a difference."""
        if self.calibration_batches == 0:
            return False
        return (self.auto and not self.recipe.trained) or self.recipe.reads_data(module)

    def watch(self, trainer: pl.Trainer, natures: Natures) -> Watch:
        """Return which metric judges, which way, and where that is known from."""
        return watch(trainer, self.monitor, self.mode, natures)

    def judges(self, trainer: pl.Trainer) -> bool:
        """Return whether somebody has named the metric that judges: the callback, or a ModelCheckpoint."""
        return (
            self.monitor is not None
            or self.max_drop is not None
            or self.watch(trainer, {}).name != "val_loss"
        )

    def goal(self, trainer: pl.Trainer, natures: Natures) -> AutoBits:
        """Return the budgets, and the metric that judges."""
        by = self.watch(trainer, natures)
        return AutoBits(
            self.max_drop,
            self.max_size,
            by.name,
            by.mode or "min",
            self.recipe,
            self.confidence,
            self.coding,
        )

    def line(self, path: str = "model.safetensors") -> str:
        """Return the line of code that quantizes the module later."""
        bits = self.recipe.bits
        return f"clipquant.quantize(module, bits={bits}).save({path!r})"

    def most_bytes(self, report: QuantizationReport) -> int | None:
        """Return the size that the file must keep, in bytes."""
        if not self.auto or self.max_size is None:
            return None
        return size_in_bytes(self.max_size, report.float_bytes)

    def fits(self, report: QuantizationReport) -> bool:
        """Return whether a file is as small as was asked."""
        most = self.most_bytes(report)
        return most is None or report.size_bytes <= most

    def unjudged(self, made: QuantizedModel) -> QuantizedModel:
        """Return a model that was quantized without a search, with what that means for the budgets."""
        if not self.auto:
            return made
        why = "the search for it failed; every row has the same bits"
        budget = Budget(self.max_drop, self.most_bytes(made.report), (), why)
        trial = Trial(made.report.size_bytes, None, "uniform", True)
        return made.reported(budget=replace(budget, trials=(trial,)))
