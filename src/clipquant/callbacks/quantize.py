"""The callback that quantizes a trained module when its fit ends."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl

from clipquant.budget import BudgetError
from clipquant.callbacks.checkpoint import check_best
from clipquant.callbacks.delivery import Parcel, hand_over, register, send_back
from clipquant.callbacks.export import check_formats, check_installed
from clipquant.callbacks.failures import Failure, QuantizationError, tell_rank
from clipquant.callbacks.fit_end import FitEnd, Outcome
from clipquant.callbacks.folder import folder_of
from clipquant.callbacks.lightning import Callback
from clipquant.callbacks.quantize_checks import (
    check_calibration,
    check_choice,
    check_others,
    check_strategy,
    check_writable,
)
from clipquant.callbacks.rehearsal import check_mode, is_built, rehearse
from clipquant.callbacks.road.ranks import from_first, leaving, several
from clipquant.callbacks.settings import Settings
from clipquant.callbacks.sharding import Sharding, outline, sharding_of, when_train_ends
from clipquant.callbacks.stopped import checkpoint_of, clear_away, stopped_at_end
from clipquant.callbacks.takeover import finish_training
from clipquant.callbacks.telling import warn
from clipquant.errors import ArgumentError
from clipquant.export import Format
from clipquant.keywords import OF_QUANTIZING, naming_keywords
from clipquant.model import QuantizedModel
from clipquant.model.asked import check_spelling
from clipquant.model.auto import check_auto, check_budgets, check_smallest
from clipquant.model.entry import quantize_by
from clipquant.quant.codes.coding import check_coding
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.methods import Method
from clipquant.quant.network.bare import bare
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.recipe import Recipe
from clipquant.report.record import QuantizationReport


def quantize(
    recipe: Recipe, module: pl.LightningModule, calibration: Calibration | None
) -> QuantizedModel:
    """Return a module quantized by a recipe; every way down the ladder goes through here."""
    return quantize_by(recipe, module, calibration)


class QuantizeOnFitEnd(Callback):
    """Quantizes the module's weights when a fit ends, judges them, and writes a small file.

    After the fit the module keeps its class, keys and dtypes and holds the dequantized weights, so
    that it gives exactly what the file gives.

    Strategies that keep weights in parts (`ModelParallelStrategy`, `FSDPStrategy`; DeepSpeed up to stage 2) are
    gathered a layer at a time when training ends; each process then holds its own parts of the dequantized
    weights. "rtn", "mse" and "hqq" are shared: each process codes its layers, and codes travel. What runs the network
    (judging by validation data, methods with data, bits="auto", exports, weights="best") has it whole in the first
    process; where it has no room there, this is said before training, and the layers are quantized one by one
    without data (bits="auto" is an error). A compiled module and compiled parts keep their author's keys in the file.

    Args:
        bits: Width of a code, 1 to 8; "auto": 0 to 8 for each output channel, as the budgets ask.
        levels: Number of steps of the grid, instead of `2**bits - 1`.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel. None: a
            channel where that holds, else groups of 128, 64 or 32 weights, whichever pay for their scales.
        method: "rtn", round to nearest on the min-max grid; "mse" and "hqq", on a better range; "gptq",
            codes that keep the layers' outputs on train batches; "adaround", codes learned until the
            network's outputs are kept; "distill", codes, grids and biases trained on its outputs for 2 bits
            and less; "auto", the best of the quick ones for the width; or an object with `name`,
            `needs_data` and `solve`, see `clipquant.quant.methods.Method`.
        calibration_batches: How many batches of the train dataloader calibrate; 0: data-free.
        max_drop: Most that the monitored metric may lose, in its own units; needs bits="auto".
        max_size: Most bytes of the file: a whole number, a fraction of the fp32 size, or a text such as "300kB",
            "300 kb", "2k", "1.5 MB" (powers of 1000) or "10KiB" (of 1024); needs bits="auto".
        monitor: The metric that judges. None: ModelCheckpoint's, else "val_loss".
        mode: Whether it is better when smaller ("min") or larger ("max"). None: as the torchmetrics object
            logged under that name says, else as a ModelCheckpoint, EarlyStopping or scheduler that monitors it
            does, else "min" for a loss; where nobody tells, an error before training.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.
        weights: Which weights: those at the end ("last") or ModelCheckpoint's best ("best").
        dirpath: Folder of the file and the report. None: `quantized/` under the log directory.
        export: Further formats to write beside the file: "pt2" (`model.pt2`), "onnx" (`model.onnx`),
            "onnx-int8" (`model.int8.onnx`), "onnx-nbits" (`model.nbits.onnx`),
            "compressed-tensors" (a folder of that ending), or a format of
            your own. One that fails leaves its reason in the report.
        confidence: With `max_drop`: how sure it must be, above 0.5 and below 1, that the true drop is within it:
            validation data are a sample. None: the drop measured and one standard error must be.
        coding: How the file holds codes: "dense"; "entropy", each weight in an entropy code where that is
            smaller, which needs the extra `clipquant[entropy]` to write and to read; or "auto", "entropy" where
            that extra is installed and saves 5 % of the file or more. With bits="auto", `max_size` counts what is
            coded.
        on_fail: Whether a missed budget, or a step that fails after training, is an error once all that could
            be done is on disk ("raise"), or a warning that says what was done instead ("warn").

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

    @naming_keywords(OF_QUANTIZING)
    def __init__(
        self,
        bits: int | Literal["auto"] = 8,
        *,
        levels: int | None = None,
        symmetric: bool | None = None,
        granularity: Literal["tensor", "channel"] | int | None = None,
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
        confidence: float | None = None,
        coding: Literal["dense", "entropy", "auto"] = "dense",
        on_fail: Literal["raise", "warn"] = "warn",
    ) -> None:
        check_spelling(method)
        chosen = MAX_BITS if bits == "auto" else bits
        recipe = Recipe(chosen, levels, symmetric, granularity, method, include, exclude, overrides)
        check_choice("weights", weights, ("last", "best"))
        check_choice("on_fail", on_fail, ("raise", "warn"))
        check_choice("mode", mode, ("min", "max", None))
        check_budgets(bits, max_drop, max_size, confidence)
        check_calibration(calibration_batches, method)
        check_coding(coding)
        if bits == "auto":
            check_auto(max_drop, max_size, recipe, confidence)
        self.settings = Settings(
            recipe,
            bits == "auto",
            calibration_batches,
            max_drop,
            max_size,
            monitor,
            mode,
            weights,
            check_formats(export, calibration_batches),
            confidence,
            coding,
        )
        self.on_fail = on_fail
        self.dirpath = dirpath
        self.report: QuantizationReport | None = None
        self.artifact_path: Path | None = None
        self._folder: Path | None = None
        self._made: Path | None = None
        self._floats: dict[str, Any] | None = None
        self._rehearsed = True
        self._told: frozenset[str] = frozenset()
        self._ended = False
        self._asked = self.settings  # and what training has left
        self._sharding: Sharding | None = None
        self._token = register(self)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what could only fail after it."""
        if stage != "fit":
            return
        self.report = self.artifact_path = self._floats = None
        self._ended = False
        self._rehearsed = trainer.num_sanity_val_steps == 0  # a dry run among them
        check_others(self, _quantizers(trainer))
        check_installed(self.settings.export)
        check_coding(self.settings.coding)
        check_strategy(trainer, self.settings.weights)
        self._sharding = None
        if self.settings.weights == "best":
            check_best(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before training that there is something to quantize and a place for it."""
        self._folder = folder_of(trainer, self, _quantizers(trainer))
        self._sharding = sharding_of(self.settings, trainer, pl_module)
        error: Exception | None = None
        try:
            if trainer.num_sanity_val_steps == 0 and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                check_mode(self.settings, trainer)
            if is_built(pl_module):
                with outline(pl_module, self._sharding):
                    self._check_weights(trainer, pl_module)
            if trainer.is_global_zero:
                self._made = None if self._folder.exists() else self._folder
                check_writable(self._folder)
        except Exception as found:  # told by every process, or one would train on alone
            error = found
        error = from_first(error)
        if error is not None:
            raise error
        if self.settings.max_drop is not None and not trainer.enable_validation:
            raise ArgumentError(
                "max_drop is judged on validation data, and the Trainer has none. Give it a "
                "val_dataloader and a validation_step, or ask for max_size alone."
            )

    def _check_weights(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Raise unless there are weights to quantize, as the globs say; a size must be within reach."""
        recipe = self.settings.recipe
        recipe.check_overrides(recipe.select(pl_module).targets)
        if self.settings.auto:
            check_smallest(pl_module, self.settings.goal(trainer, {}))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have weights that are kept in parts gathered at the end of training, while the strategy stands."""
        if self._sharding is not None:
            when_train_ends(trainer, self._sharding.gather_)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Rehearse before the first step, where the Trainer's sanity check is not turned off."""
        if self._rehearsed:
            return
        self._rehearsed = True
        with leaving():
            failures = from_first(self._rehearsal(trainer, pl_module, batch))
        self._told = frozenset(failure.step for failure in failures)
        for failure in failures:
            if failure.fatal:
                raise ArgumentError(f"{failure.step}: {failure.error}. {failure.remedy}")
        if failures and self.on_fail == "raise":
            raise QuantizationError(
                f"before training: {'; '.join(map(str, failures))} on_fail='warn' would go on."
            )

    def _rehearsal(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any
    ) -> tuple[Failure, ...]:
        if self._sharding is not None:
            return self._sharding.rehearse(
                lambda: rehearse(self.settings, trainer, pl_module, batch)
            )
        with bare(pl_module):
            return rehearse(self.settings, trainer, pl_module, batch)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        clear_away(self._made)
        if not self._ended and trainer.fit_loop.epoch_loop.global_step > 0:
            kept = checkpoint_of(trainer)
            resume = f"ckpt_path={kept!r}" if kept else "a checkpoint"
            warn(
                f"The fit was stopped by {type(exception).__name__}, so nothing was quantized; the "
                f"module holds its float weights. Resume the fit from {resume}, or call "
                "clipquant.quantize(module).save(path)."
            )

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Quantize, judge, write, and only then load the dequantized weights into the module."""
        self._ended = True
        self._asked = self.settings.taking_over(*finish_training(trainer, pl_module))
        if trainer.global_step == 0:
            warn("No optimizer step was taken: QuantizeOnFitEnd quantizes weights as given.")
        with leaving():
            outcome = self._ended_in_parts(trainer, pl_module) or self._ended_whole(
                trainer, pl_module
            )
        self.report, self.artifact_path = outcome.report, outcome.path
        found = {"report": self.report, "artifact_path": self.artifact_path}
        parcel = Parcel(self._token, found)
        hand_over(self, parcel)
        send_back(trainer, parcel)
        self._say_(outcome)

    def _ended_whole(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Outcome:
        """Return what came of a module of which every process has all, after loading it there."""
        with bare(pl_module):
            self._take_floats_(trainer, pl_module)
            outcome = _told(trainer, self._outcome(trainer, pl_module))
            if outcome.made is not None:
                pl_module.load_state_dict(outcome.made.state_dict(), strict=False)
        return outcome

    def _ended_in_parts(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Outcome | None:
        """Return what came of a module in parts, after each process has its own of the result; None where it is not."""
        sharding, self._sharding = self._sharding, None
        if sharding is None:
            return None
        if not sharding.gathered:  # no step was taken, and the strategy's last hook was not called
            sharding.gather_()
        outcome = Outcome()
        if trainer.is_global_zero and sharding.failed:
            outcome = Outcome(failures=(sharding.failure(),))
        elif trainer.is_global_zero:
            outcome = self._outcome(trainer, pl_module, sharding)
        made = outcome.made
        outcome = _told(trainer, replace(outcome, made=None))
        sharding.write_back_(made, every=len(_quantizers(trainer)) > 1)
        return outcome

    @property
    def used(self) -> bool:
        """Whether it has seen a fit begin."""
        return self._folder is not None

    def _outcome(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        sharding: Sharding | None = None,
    ) -> Outcome:
        """Return what came of the fit's end; an Outcome that says why where nothing did."""
        folder = self._folder or folder_of(trainer, self, _quantizers(trainer))
        shared = (lambda recipe: recipe) if sharding is None else sharding.with_shares
        work = FitEnd(
            self._asked,
            trainer,
            folder,
            lambda recipe, *given: quantize(shared(recipe), *given),
            self._told,
        )
        try:
            if sharding is None:
                return work.run(pl_module)
            if not sharding.whole:
                return work.run_apart(sharding.assembled())
            with sharding.put_together():
                return work.run(pl_module)
        except (
            KeyboardInterrupt,
            SystemExit,
        ):  # the second is what a nested Trainer makes of the first
            self.artifact_path = work.saved
            warn(f"{stopped_at_end(self.settings, trainer, folder, work.saved)}.")
            raise
        except Exception as error:  # nothing leaves the end of a fit unless it is asked to
            failure = Failure(
                "quantizing",
                f"{type(error).__name__}: {error}",
                "the module keeps its float weights",
                f"Later: {self.settings.line()}",
            )
            work.failures.add_(failure)
            return Outcome(failures=tuple(work.failures.items))

    def _say_(self, outcome: Outcome) -> None:
        """Tell a missed budget, and raise where failures shall."""
        if outcome.report is not None and outcome.report.warning:
            warn(f"The quantized network is {outcome.report.warning}.")
        if outcome.budget and self.on_fail == "raise":
            raise BudgetError(f"{outcome.budget}. What comes nearest is in {outcome.path}.")
        if outcome.budget:
            warn(f"Budget missed: {outcome.budget}.")
        if outcome.report is not None and outcome.report.suspicion:
            warn(f"Not believed: {outcome.report.suspicion}.")
        if outcome.failures and self.on_fail == "raise":
            said = "; ".join(map(str, outcome.failures))
            raise QuantizationError(f"{said} What could be done is in {outcome.path}.")

    def _take_floats_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let each of several callbacks of this kind start from the weights that were trained."""
        quantizers = _quantizers(trainer)
        if len(quantizers) == 1:
            return
        first = quantizers[0]
        if first is self:
            self._floats = {k: v.clone() for k, v in pl_module.state_dict().items()}
        elif first._floats is not None:
            pl_module.load_state_dict(first._floats, strict=False)
        if quantizers[-1] is self:
            first._floats = None


def _told(trainer: pl.Trainer, outcome: Outcome) -> Outcome:
    """Return what came of it in the first process, which holds for all, once all have come; each says what failed."""
    waited = time.monotonic()
    outcome = from_first(outcome)
    if several():
        tell_rank(trainer, outcome.failures, time.monotonic() - waited)
    return outcome


def _quantizers(trainer: pl.Trainer) -> list[QuantizeOnFitEnd]:
    return [c for c in trainer.callbacks if isinstance(c, QuantizeOnFitEnd)]  # type: ignore[attr-defined]
