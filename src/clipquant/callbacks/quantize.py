"""The callback that quantizes a trained module when its fit ends."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_warn

from clipquant.callbacks.evaluate import copy_module, validation_metrics
from clipquant.model import QuantizedModel, quantize
from clipquant.quant.layers import select
from clipquant.quant.model import check_method, specs_for
from clipquant.quant.spec import QuantSpec
from clipquant.report.record import QuantizationReport
from clipquant.report.table import print_summary

FILE = "model.safetensors"


class QuantizeOnFitEnd(pl.Callback):
    """Quantizes the module's weights when a fit ends, judges them, and writes a small file.

    After the fit the module keeps its class, keys and dtypes and holds the dequantized weights, so
    that it gives exactly what the file gives.

    Args:
        bits: Width of a code, 1 to 8.
        levels: Number of steps of the grid, instead of `2**bits - 1`.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel.
        method: "rtn", round to nearest on the min-max grid.
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
        export: Further formats to write.
        on_fail: What to do when a budget cannot be met.

    Attributes:
        report: After the fit, the `QuantizationReport`.
        artifact_path: After the fit, the path of the file.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    >>> QuantizeOnFitEnd(bits=9)
    Traceback (most recent call last):
    ...
    ValueError: bits must be a whole number from 1 to 8; got 9. Use 8 for the widest grid, or \
bits='auto' with max_drop or max_size to have it chosen.
    """

    def __init__(
        self,
        bits: int | Literal["auto"] = 8,
        *,
        levels: int | None = None,
        symmetric: bool | None = None,
        granularity: Literal["tensor", "channel"] | int = "channel",
        method: Literal["auto", "rtn", "mse", "hqq", "gptq", "adaround"] = "auto",
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
        export: list[Literal["onnx", "onnx-int8", "pt2"]] | None = None,
        on_fail: Literal["raise", "warn"] = "warn",
    ) -> None:
        check_method(method)
        check_choice("weights", weights, ("last", "best"))
        check_choice("on_fail", on_fail, ("raise", "warn"))
        check_choice("mode", mode, ("min", "max", None))
        _check_budgets(bits, max_drop, max_size)
        if calibration_batches != int(calibration_batches) or calibration_batches < 0:
            raise ValueError(
                "calibration_batches must be a whole number, 0 or more; got "
                f"{calibration_batches!r}. 0 quantizes without data."
            )
        self.spec = QuantSpec(bits, levels, symmetric, granularity)  # type: ignore[arg-type]
        self.method = method
        self.monitor, self.mode = monitor, mode
        self.include, self.exclude, self.overrides = include, exclude, overrides
        self.weights = weights
        self.dirpath = dirpath
        self.report: QuantizationReport | None = None
        self.artifact_path: Path | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what could only fail after it."""
        if stage != "fit":
            return
        if isinstance(trainer.strategy, (FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy)):
            raise ValueError(
                "QuantizeOnFitEnd needs whole weights at fit end; "
                f"{type(trainer.strategy).__name__} shards them. Train with strategy='ddp' or one "
                "device, or call clipquant.quantize() on the consolidated checkpoint."
            )
        if self.weights == "best" and not trainer.checkpoint_callbacks:
            raise ValueError(
                "weights='best' needs a ModelCheckpoint callback, and the Trainer has none. "
                "Add one, or use weights='last'."
            )

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find out before training that there is something to quantize and a place for it."""
        specs_for(select(pl_module, self.include, self.exclude).targets, self.spec, self.overrides)
        if trainer.is_global_zero:
            check_writable(self._folder(trainer))

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
        module = copy_module(pl_module)
        if self.weights == "best":
            load_best(trainer, module)
        quantized = quantize(
            module,
            self.spec.bits,
            levels=self.spec.levels,
            symmetric=self.spec.symmetric,
            granularity=self.spec.granularity,
            method=self.method,
            include=self.include,
            exclude=self.exclude,
            overrides=self.overrides,
        )
        path = quantized.save(self._folder(trainer) / FILE)
        before = validation_metrics(trainer, module)
        after = validation_metrics(trainer, quantized.apply_to(module))  # type: ignore[arg-type]
        monitor, mode = monitored(trainer, self.monitor, self.mode)
        self.report = replace(
            quantized.report,
            float_metrics=before,
            quantized_metrics=after,
            monitor=monitor,
            mode=mode,
            path=str(path),
        )
        self.artifact_path = path
        print_summary(self.report)
        return quantized

    def _folder(self, trainer: pl.Trainer) -> Path:
        if self.dirpath is not None:
            return Path(self.dirpath)
        return Path(trainer.log_dir or trainer.default_root_dir) / "quantized"


def monitored(trainer: pl.Trainer, monitor: str | None, mode: str | None) -> tuple[str, str]:
    """Return which metric judges and which way: as given, else ModelCheckpoint's, else val_loss."""
    for callback in trainer.checkpoint_callbacks:
        own = callback.monitor if isinstance(callback, ModelCheckpoint) else None
        if own is not None and monitor in (None, own):
            return own, mode or callback.mode  # type: ignore[attr-defined]
    return monitor or "val_loss", mode or "min"


def load_best(trainer: pl.Trainer, module: pl.LightningModule) -> None:
    """Load into `module` the weights of the best checkpoint that the Trainer has kept."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    if not path:
        raise ValueError(
            "weights='best' found no best checkpoint: ModelCheckpoint has saved none. "
            "Give it a monitor, or use weights='last'."
        )
    checkpoint: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `choices`.

    >>> check_choice("mode", "up", ("min", "max"))
    Traceback (most recent call last):
    ...
    ValueError: mode must be one of 'min', 'max'; got 'up'.
    """
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")


def check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, which is made where it is missing."""
    probe = folder / ".clipquant-probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise OSError(
            error.errno,
            f"QuantizeOnFitEnd cannot write to {str(folder)!r} ({error.strerror}): "
            "set dirpath to a folder that is writable",
        ) from error


def _check_budgets(bits: object, max_drop: object, max_size: object) -> None:
    given = {"max_drop": max_drop, "max_size": max_size}
    named = ", ".join(f"{k}={v!r}" for k, v in given.items() if v is not None)
    if bits != "auto" and named:
        raise ValueError(
            f"a budget needs bits='auto', which chooses the bits by it; got bits={bits!r} with "
            f"{named}. Set bits='auto', or leave the budget out."
        )
    if bits == "auto" and not named:
        raise ValueError("bits='auto' needs max_drop or max_size to choose by; got neither.")
