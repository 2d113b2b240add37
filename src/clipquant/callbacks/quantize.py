"""The callback that quantizes a trained module when its fit ends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from clipquant.artifact import read_metadata
from clipquant.budget import BudgetError
from clipquant.callbacks.auto import choose_bits
from clipquant.callbacks.calibration import step_forward
from clipquant.callbacks.checkpoint import load_best, monitored
from clipquant.callbacks.data import calibration_batches as take_batches
from clipquant.callbacks.data import validation_data
from clipquant.callbacks.evaluate import judge
from clipquant.callbacks.export import check_formats, check_installed, export_files
from clipquant.callbacks.guest import stand_in
from clipquant.callbacks.latency import measure_latency
from clipquant.callbacks.loggers import log_report
from clipquant.callbacks.quantize_checks import (
    check_budgets,
    check_calibration,
    check_choice,
    check_writable,
    refuse_shards,
)
from clipquant.export import Format
from clipquant.model import QuantizedModel
from clipquant.model.auto import AutoBits, check_auto, check_smallest
from clipquant.model.entry import quantize_by
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.methods import Method
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.network.twin import twin_of
from clipquant.quant.recipe import Recipe
from clipquant.report.files import write_report
from clipquant.report.progress import progress_bar
from clipquant.report.record import QuantizationReport
from clipquant.report.table import print_summary

FILE = "model.safetensors"


class QuantizeOnFitEnd(pl.Callback):
    """Quantizes the module's weights when a fit ends, judges them, and writes a small file.

    After the fit the module keeps its class, keys and dtypes and holds the dequantized weights, so
    that it gives exactly what the file gives.

    Args:
        bits: Width of a code, 1 to 8; "auto": 0 to 8 for each output channel, as the budgets ask.
        levels: Number of steps of the grid, instead of `2**bits - 1`.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel.
        method: "rtn", round to nearest on the min-max grid; "mse" and "hqq", on a better range; "gptq",
            codes that keep the layers' outputs on train batches; "adaround", codes learned until the
            network's outputs are kept; "auto", the best of the quick ones for the width; or an object
            with `name`, `needs_data` and `solve`, see `clipquant.quant.methods.Method`.
        calibration_batches: How many batches of the train dataloader calibrate; 0: data-free.
        max_drop: Most that the monitored metric may lose, in its own units; needs bits="auto".
        max_size: Most bytes of the file: a number, a fraction of the fp32 size, or "300kB"; needs
            bits="auto".
        monitor: The metric that judges. None: ModelCheckpoint's, else "val_loss".
        mode: Whether it is better when smaller ("min") or larger ("max"). None: ModelCheckpoint's,
            else "min".
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.
        weights: Which weights: those at the end ("last") or ModelCheckpoint's best ("best").
        dirpath: Folder of the file and the report. None: `quantized/` under the log directory.
        export: Further formats to write beside the file: "pt2" (`model.pt2`), "onnx" (`model.onnx`),
            "onnx-int8" (`model.int8.onnx`), "compressed-tensors" (a folder of that ending), or a format of
            your own. One that fails leaves its reason in the report.
        on_fail: What to do when a budget cannot be met.

    Attributes:
        report: After the fit, the `QuantizationReport`.
        artifact_path: After the fit, the path of the file.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    >>> QuantizeOnFitEnd(bits=9)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: bits must be a whole number from 1 to 8; got 9. Use 8 for the widest grid, or \
bits='auto' with max_drop or max_size to have it chosen.
    """

    def __init__(
        self,
        bits: int | Literal["auto"] = 8,
        *,
        levels: int | None = None,
        symmetric: bool | None = None,
        granularity: Literal["tensor", "channel"] | int = "channel",
        method: str | Method = "auto",
        calibration_batches: int = 16,
        max_drop: float | None = None,
        max_size: int | float | str | None = None,  # noqa: PYI041 - an int is bytes, a float a share
        monitor: str | None = None,
        mode: Literal["min", "max"] | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        overrides: dict[str, int] | None = None,
        weights: Literal["last", "best"] = "last",
        dirpath: str | Path | None = None,
        export: list[str | Format] | None = None,
        on_fail: Literal["raise", "warn"] = "warn",
    ) -> None:
        chosen = MAX_BITS if bits == "auto" else bits
        self.recipe = Recipe(
            chosen, levels, symmetric, granularity, method, include, exclude, overrides
        )
        check_choice("weights", weights, ("last", "best"))
        check_choice("on_fail", on_fail, ("raise", "warn"))
        check_choice("mode", mode, ("min", "max", None))
        check_budgets(bits, max_drop, max_size)
        check_calibration(calibration_batches, method)
        self.export = check_formats(export, calibration_batches)
        self.calibration_batches, self.max_drop = calibration_batches, max_drop
        self.max_size, self.on_fail = max_size, on_fail
        self.auto = bits == "auto"
        if bits == "auto":
            check_auto(max_drop, max_size, self.recipe)
        self.monitor, self.mode = monitor, mode
        self.weights = weights
        self.dirpath = dirpath
        self.report: QuantizationReport | None = None
        self.artifact_path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what could only fail after it."""
        if stage != "fit":
            return
        check_installed(self.export)
        refuse_shards(trainer)
        if self.weights == "best" and not trainer.checkpoint_callbacks:
            raise ValueError(
                "weights='best' needs a ModelCheckpoint callback, and the Trainer has none. "
                "Add one, or use weights='last'."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before training that there is something to quantize and a place for it."""
        self.recipe.specs(self.recipe.select(pl_module).targets)
        if trainer.is_global_zero:
            check_writable(self._folder(trainer))
        if self.auto:
            check_smallest(pl_module, self._goal(*monitored(trainer, self.monitor, self.mode)))
        if self.auto and self.max_drop is not None and validation_data(trainer, pl_module) is None:
            raise ValueError(
                "max_drop is judged on validation data, and the Trainer has none. Give it a "
                "val_dataloader and a validation_step, or ask for max_size alone."
            )

    def on_sanity_check_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before training that the metric that shall judge is logged at all."""
        monitor, _ = monitored(trainer, self.monitor, self.mode)
        if self.auto and self.max_drop is not None and monitor not in trainer.callback_metrics:
            raise ValueError(
                f"max_drop watches {monitor!r}, which validation does not log; logged are "
                f"{', '.join(sorted(trainer.callback_metrics)) or 'none'}. Set monitor to one of them."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if self.report is None and trainer.fit_loop.epoch_loop.global_step > 0:
            rank_zero_warn(
                f"The fit was stopped by {type(exception).__name__}, so nothing was quantized; the "
                "module holds its float weights. Resume the fit from a checkpoint, or call "
                "clipquant.quantize(module).save(path)."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize, judge, write, and only then load the dequantized weights into the module."""
        if trainer.global_step == 0:
            rank_zero_warn(
                "No optimizer step was taken: QuantizeOnFitEnd quantizes weights as given."
            )
        state = {}
        if trainer.is_global_zero:
            state = self._quantize(trainer, pl_module).state_dict()
        pl_module.load_state_dict(trainer.strategy.broadcast(state), strict=False)

    def _quantize(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> QuantizedModel:
        with stand_in(pl_module) as module:
            return self._quantize_copy(trainer, module)

    def _quantize_copy(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizedModel:
        if self.weights == "best":
            load_best(trainer, module)
        monitor, mode = monitored(trainer, self.monitor, self.mode)
        before = judge(trainer, module)
        if self.auto:
            quantized = self._quantize_auto(trainer, module, before, (monitor, mode))
        else:
            quantized = self._quantize_plain(trainer, module)
            after = judge(trainer, module, quantized.state_dict())
            quantized = quantized.reported(
                float_metrics=before,
                quantized_metrics=after,
                monitor=monitor,
                mode=mode,
            )
        quantized = quantized.reported(seed=_seed())
        path = quantized.save(self._folder(trainer) / FILE)
        self.artifact_path = path
        self.report = replace(
            quantized.report,
            path=str(path),
            sha256=read_metadata(path)["sha256"],
            latency=measure_latency(trainer, module, quantized.state_dict()),
        )
        records = export_files(
            trainer,
            module,
            replace(quantized, report=self.report),
            self.export,
            path.parent,
            calibration_batches=self.calibration_batches,
            max_drop=self.max_drop,
        )
        exports = tuple(record.to_dict() for record in records)
        self.report = replace(self.report, exports=exports)
        write_report(self.report, path.parent)
        log_report(self.report, trainer.loggers, trainer.global_step)
        print_summary(self.report)
        return replace(quantized, report=self.report)

    def _calibration(self, trainer: pl.Trainer, module: pl.LightningModule) -> list[Any] | None:
        """Return train batches where a weight's method or a BatchNorm asks for them; else None."""
        if self.calibration_batches == 0 or not self.recipe.reads_data(module):
            return None
        return take_batches(trainer, self.calibration_batches)

    def _quantize_plain(self, trainer: pl.Trainer, module: pl.LightningModule) -> QuantizedModel:
        data = self._calibration(trainer, module)
        if data is None:
            return quantize_by(self.recipe, module)
        with progress_bar(trainer.progress_bar_callback is not None) as tell:
            calibration = Calibration(data, step_forward(trainer, module), tell)
            quantized = quantize_by(self.recipe, twin_of(module), calibration)
        said = f"{len(data)} batches of the train dataloader"
        return quantized.reported(calibration=said)

    def _quantize_auto(
        self,
        trainer: pl.Trainer,
        module: pl.LightningModule,
        before: Mapping[str, float],
        judged_by: tuple[str, str],
    ) -> QuantizedModel:
        goal = self._goal(*judged_by)
        found = choose_bits(trainer, module, goal, self.calibration_batches, before)
        budget = found.report.budget
        if budget is not None and budget.failure:
            if self.on_fail == "raise":
                raise BudgetError(f"{budget.failure}. Nothing was written; on_fail='warn' would.")
            rank_zero_warn(f"Budget missed: {budget.failure}.")
        return found

    def _goal(self, monitor: str, mode: str) -> AutoBits:
        return AutoBits(self.max_drop, self.max_size, monitor, mode, self.recipe)

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / "quantized"


def _seed() -> int | None:
    seed = os.environ.get("PL_GLOBAL_SEED")
    return int(seed) if seed else None
