"""What QuantizeOnFitEnd refuses before training: settings that are wrong in themselves or that do not go together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl

from clipquant.artifact import claim_folder
from clipquant.callbacks.lightning import package_of
from clipquant.errors import ArgumentError, PlaceError
from clipquant.quant.methods import METHODS, Method
from clipquant.quant.recipe import data_free


def check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless `value` is one of `choices`.

    >>> check_choice("mode", "up", ("min", "max"))
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: mode must be one of 'min', 'max'; got 'up'.
    """
    if value not in choices:
        raise ArgumentError(
            f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}."
        )


def check_writable(folder: Path) -> None:
    """Raise unless a file can be made in `folder`, which is made where it is missing."""
    try:
        claim_folder(folder)
    except OSError as error:
        raise PlaceError(
            error.errno,
            f"QuantizeOnFitEnd cannot write to {str(folder)!r} ({error.strerror}): "
            "set dirpath to a folder that is writable",
        ) from error


def check_calibration(calibration_batches: int, method: str | Method) -> None:
    """Raise unless the count is one, and not 0 where the method calibrates.

    >>> check_calibration(0, "gptq")
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: method='gptq' calibrates on train batches; got calibration_batches=0. Set it \
to 1 or more, or choose \
'rtn', 'mse' or 'hqq'.
    """
    if not isinstance(calibration_batches, int) or calibration_batches < 0:
        raise ArgumentError(
            "calibration_batches must be a whole number, 0 or more; got "
            f"{calibration_batches!r}. 0 quantizes without data."
        )
    solver = METHODS[method] if isinstance(method, str) else method
    if solver.needs_data and calibration_batches == 0:
        raise ArgumentError(
            f"method={solver.name!r} calibrates on train batches; got calibration_batches=0. "
            f"Set it to 1 or more, or choose {data_free()}."
        )


def check_strategy(trainer: pl.Trainer, weights: str) -> None:
    """Raise for strategies that keep weights in parts which cannot be gathered.

    Args:
        trainer: About to fit.
        weights: "last" or "best".

    Raises:
        ArgumentError: Naming the strategy, its setting and the remedy.
    """
    own, strategy = package_of(trainer).strategies, trainer.strategy
    name = type(strategy).__name__
    if isinstance(strategy, own.FSDPStrategy) and not strategy.kwargs.get("use_orig_params", True):
        raise ArgumentError(
            "QuantizeOnFitEnd gathers each parameter under its own name; got "
            f"{name}(use_orig_params=False), which keeps none. Leave use_orig_params out."
        )
    if isinstance(strategy, own.DeepSpeedStrategy) and strategy.zero_stage_3:
        raise ArgumentError(
            f"QuantizeOnFitEnd takes DeepSpeed up to stage 2, where each process has whole weights; got {name} of "
            "stage 3. Use stage=2, ModelParallelStrategy (FSDP2) or FSDPStrategy, or call clipquant.quantize() on the "
            "consolidated checkpoint."
        )
    if isinstance(strategy, own.DeepSpeedStrategy) and weights == "best":
        raise ArgumentError(
            f"weights='best' reads a checkpoint as a whole, and those of {name} are in parts for its engine alone. "
            "Use weights='last'."
        )


def check_others(callback: Any, others: list[Any]) -> None:
    """Raise where a callback is listed twice, or two would write to one folder.

    Args:
        callback: This one.
        others: Every one of its kind in the Trainer, itself included.
    """
    if sum(other is callback for other in others) > 1:
        raise ArgumentError(
            "a QuantizeOnFitEnd must be listed once; this one stands in the Trainer's callbacks "
            f"{sum(other is callback for other in others)} times. Leave one, or make two with a dirpath each."
        )
    folders = [Path(other.dirpath).resolve() for other in others if other.dirpath is not None]
    if callback.dirpath is not None and folders.count(Path(callback.dirpath).resolve()) > 1:
        raise ArgumentError(
            f"each QuantizeOnFitEnd needs a folder of its own; {str(callback.dirpath)!r} is the dirpath of "
            f"{folders.count(Path(callback.dirpath).resolve())}. Give each another dirpath, or none."
        )
