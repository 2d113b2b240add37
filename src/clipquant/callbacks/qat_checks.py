"""What QuantizationAwareTraining refuses before training: settings that do not go together, alone or in one Trainer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import nn

from clipquant.callbacks.course import check_same
from clipquant.callbacks.lightning import package_of
from clipquant.callbacks.qat_auto import budgets_of
from clipquant.callbacks.settings import Settings
from clipquant.errors import ArgumentError
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.zeros import with_zero
from clipquant.quant.network.layers import Target

_NAME = "QuantizationAwareTraining"


def as_weight(distill: Any) -> float:
    """Return how much another loss counts, 0 or more, or raise.

    >>> as_weight(-1)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: distill is a factor of a loss, 0 (none) or more; got -1.
    """
    number = isinstance(distill, (int, float)) and not isinstance(distill, bool)
    if not number or not 0 <= distill < math.inf:
        raise ArgumentError(f"distill is a factor of a loss, 0 (none) or more; got {distill!r}.")
    return float(distill)


def check_beside(callback: Any, trainer: pl.Trainer) -> None:
    """Raise for what cannot stand in one Trainer with a callback that trains quantized.

    Args:
        callback: The QuantizationAwareTraining.
        trainer: Its Trainer.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    refuse_shards_of(trainer, _NAME)
    own = package_of(trainer)
    if any(isinstance(other, own.callbacks.ModelPruning) for other in callbacks):
        raise ArgumentError(
            f"{_NAME} needs weights under their own names, and ModelPruning keeps them as weight_orig and a mask. "
            "Prune with SparsifyWeights, or in a fit before."
        )
    if callback.auto and budgets_of(trainer) is None:
        raise ArgumentError(
            f"{_NAME}(bits='auto') trains the bits that budgets choose, and there are none. Add "
            "QuantizeOnFitEnd(bits='auto', max_size=...) or max_drop=..., or give bits as a number."
        )
    for other in callbacks:
        settings = getattr(other, "settings", None)
        if isinstance(settings, Settings):
            _check_quantizer(callback, settings)


def _check_quantizer(callback: Any, settings: Settings) -> None:
    bits, own = settings.recipe.bits, callback.recipe.bits
    if callback.auto:
        return
    if settings.auto:
        raise ArgumentError(
            f"bits='auto' chooses other grids than those that {_NAME}(bits={own}) trains. Give both "
            "bits='auto', or QuantizeOnFitEnd no bits: the file holds what was trained."
        )
    if bits not in (own, MAX_BITS):
        raise ArgumentError(
            f"the file holds what was trained, {own} bits by {_NAME}; got QuantizeOnFitEnd(bits={bits}). Leave its "
            "bits out, or give both the same."
        )


def refuse_shards_of(trainer: pl.Trainer, name: str) -> None:
    """Refuse strategies under which no process holds whole weights while it trains."""
    own = package_of(trainer).strategies
    kinds = (own.FSDPStrategy, own.ModelParallelStrategy, own.DeepSpeedStrategy)
    if isinstance(trainer.strategy, kinds):
        raise ArgumentError(
            f"{name} needs whole weights while it trains; {type(trainer.strategy).__name__} shards them. Train with "
            "strategy='ddp' or one device."
        )


def pruned_names(trainer: pl.Trainer, module: nn.Module) -> set[str]:
    """Return the keys of the weights that callbacks of a Trainer prune."""
    found: set[str] = set()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names_in = getattr(callback, "pruned_names_in", None)
        found |= set() if names_in is None else set(names_in(module))
    return found


def check_zero_codes(
    callback: Any, trainer: pl.Trainer, module: nn.Module, targets: Sequence[Target]
) -> None:
    """Raise where weights that are pruned would be trained on a grid without an exact zero."""
    if callback.auto:
        return  # whose grids keep zeros
    specs, symmetric = callback.recipe.specs(targets), callback.recipe.symmetric
    for name in sorted(pruned_names(trainer, module) & specs.keys()):
        spec = with_zero(specs[name]) if symmetric is None else specs[name]
        if not spec.symmetric:
            given = f"bits={spec.bits}" if symmetric is None else f"symmetric={symmetric}"
            raise ArgumentError(
                f"pruned weights need a code of exactly zero; {name} is pruned by SparsifyWeights and trained with "
                f"{given}, which has none. Use bits=2, levels=2 (ternary) or more, with symmetric left out, or exclude "
                "it from one of them."
            )


def settings_of(callback: Any) -> dict[str, Any]:
    """Return what tells grids apart, as a checkpoint holds it."""
    recipe = callback.recipe
    return {
        "bits": "auto" if callback.auto else recipe.bits,
        "levels": recipe.levels,
        "symmetric": recipe.symmetric,
        "granularity": recipe.granularity,
        "overrides": dict(recipe.overrides or {}),
        "activations": callback.activations,
    }


def check_resumed(callback: Any, loaded: Mapping[str, Any], names: Sequence[str]) -> None:
    """Raise where a checkpoint was trained on other grids, or for other weights, than are asked for now.

    Args:
        callback: The QuantizationAwareTraining.
        loaded: Its state in the checkpoint.
        names: Keys of the weights that are trained now.
    """
    what = f"the grids that its checkpoint has trained: {_NAME}"
    check_same(what, settings_of(callback), loaded["settings"])
    others = sorted(set(names) ^ set(loaded["grids"]))
    if others:
        raise ArgumentError(
            f"a fit goes on with the weights that its checkpoint has trained quantized; {', '.join(others[:5])} "
            "differ. Give include and exclude as they were."
        )


def is_compiled(module: nn.Module) -> bool:
    """Return whether `torch.compile` has made anything of a module."""
    return bool(getattr(module, "_compiler_ctx", None)) or any(
        type(part).__name__ == "OptimizedModule" for part in module.modules()
    )


def forget_compiled(module: nn.Module) -> None:
    """Let what `torch.compile` has made of a module be made anew: it reads the weights themselves."""
    if is_compiled(module):
        torch.compiler.reset()
