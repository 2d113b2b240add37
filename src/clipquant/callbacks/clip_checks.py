"""What GradientClipCallback refuses: settings that are wrong in themselves or that do not go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import LBFGS, Optimizer

from clipquant.callbacks.clip_resume import settings_in_key
from clipquant.callbacks.lightning import package_of
from clipquant.clip.checks import is_count, is_number
from clipquant.clip.progress import Skip
from clipquant.clip.rule import Rule
from clipquant.errors import ArgumentError, ArgumentTypeError, RunError


class SetupError(ArgumentError, MisconfigurationException):
    """Settings that do not go with this Trainer, module or optimizer."""


def refuse_second_clipping(trainer: pl.Trainer) -> None:
    """Refuse the Trainer's own clipping, which would run after the callback."""
    value = trainer.gradient_clip_val
    if value is not None and value > 0:
        algorithm = trainer.gradient_clip_algorithm or "norm"
        raise SetupError(
            f"gradients would be clipped twice: by GradientClipCallback and by Trainer(gradient_clip_val={value}, "
            f"gradient_clip_algorithm={str(getattr(algorithm, 'value', algorithm))!r}). Remove gradient_clip_val from "
            "the Trainer, or remove GradientClipCallback from its callbacks"
        )


def refuse_strategy(trainer: pl.Trainer) -> None:
    """Refuse strategies that keep the gradients from the callback."""
    strategies = package_of(trainer).strategies
    if isinstance(trainer.strategy, strategies.DeepSpeedStrategy):
        raise SetupError(
            "DeepSpeedStrategy clips in its own engine and never shows GradientClipCallback the gradients. Remove "
            "GradientClipCallback and set Trainer(gradient_clip_val=...), or use another strategy such as "
            '"ddp" or ModelParallelStrategy'
        )
    if isinstance(trainer.strategy, strategies.FSDPStrategy):
        raise SetupError(
            "FSDPStrategy shows GradientClipCallback flattened shards, whose norms and non-finite elements differ from "
            "process to process. Use ModelParallelStrategy (FSDP2) with GradientClipCallback, or remove "
            'GradientClipCallback and set Trainer(gradient_clip_val=..., gradient_clip_algorithm="value")'
        )


def check_optimizer(optimizer: Optimizer, rule: Rule) -> None:
    """Refuse or warn of a rule on an optimizer that evaluates gradients several times a step."""
    if not isinstance(optimizer, LBFGS):
        return
    if rule.init():
        raise SetupError(
            f"{rule!r} keeps statistics from step to step, but LBFGS shows it every evaluation of its line search. "
            "Use a rule without memory (Value, Norm, AGC), or another optimizer"
        )
    rank_zero_warn(
        "LBFGS evaluates the gradients several times a step; GradientClipCallback clips each evaluation, which changes "
        "the curvature that LBFGS estimates"
    )


def refuse_zero(rule: Any, where: str = "GradientClipCallback") -> None:
    """Refuse the number 0, which switches clipping off in Lightning and would stop all learning here."""
    if is_number(rule) and rule == 0:
        raise ArgumentError(
            f"{where}: the rule must not be the number 0, got {rule!r}, which can mean two things. To switch clipping "
            "off, as gradient_clip_val=0 does in Lightning, leave GradientClipCallback out (a parameter group: None); "
            "to freeze the parameters on purpose, clamping every gradient element to 0, give Value(0.0)"
        )


def refuse_twins(callback: Any, callbacks: Sequence[Any]) -> None:
    """Refuse two callbacks with the same rule for the same parameters: no checkpoint could tell their states apart."""
    if sum(settings_in_key(each) == settings_in_key(callback) for each in callbacks) > 1:
        raise SetupError(
            f"the Trainer has two GradientClipCallbacks with the same settings: {callback.rule!r}, "
            f"optimizers={callback.optimizers}, include={callback.include}, exclude={callback.exclude}. The second "
            "would clip what the first has clipped: remove one, or give each parameters of its own by include, "
            "exclude or optimizers"
        )


def warn_of_tuners(trainer: pl.Trainer) -> None:
    """Say that Lightning's finders run without callbacks."""
    callbacks = package_of(trainer).callbacks
    finders = (callbacks.LearningRateFinder, callbacks.BatchSizeFinder)
    found = [type(c).__name__ for c in trainer.callbacks if isinstance(c, finders)]  # type: ignore[attr-defined]
    if found:
        rank_zero_warn(
            f"GradientClipCallback does not clip what {' and '.join(found)} tries: Lightning runs it without "
            "callbacks, on unclipped gradients. A learning rate found so may be lower than clipping allows"
        )


def warn_of_unseen_steps(trainer: pl.Trainer, indices: Sequence[int]) -> None:
    """Warn of optimizers that no step was seen of although training ran."""
    unseen = [
        i for i in indices if len(indices) == len(trainer.optimizers) or trainer.optimizers[i].state
    ]
    if trainer.fit_loop.total_batch_idx < 0 or not unseen:
        return
    rank_zero_warn(
        f"GradientClipCallback saw no step of optimizer {', '.join(map(str, unseen))}, so nothing of it was clipped. "
        "Under manual optimization step what self.optimizers() returns, not the bare optimizer "
        "(use_pl_optimizer=False), or call clip_gradients_ before optimizer.step()"
    )


def check_streak(
    streak: Sequence[Skip], allowed: int | None, policy: str, scaler: torch.amp.GradScaler | None
) -> None:
    """Refuse to go on when more steps in a row were skipped than allowed.

    One overflow is how a GradScaler finds its scale. At a scale of 1 or less it is not the scale, and under "raise" no
    skip is allowed any more.
    """
    limit = allowed
    if scaler is not None and streak:
        hopeless = policy == "raise" and scaler.get_scale() <= 1.0
        limit = 0 if hopeless else None if allowed is None else max(allowed, 1)
    if limit is not None and len(streak) > limit:
        history = "\n  ".join(map(str, streak))
        raise RunError(
            f"{len(streak)} steps in a row were skipped, max_consecutive_skips={allowed} allows {limit}: lower the "
            "learning rate, look for the cause with torch.autograd.set_detect_anomaly(True), or raise the limit.\n  "
            f"{history}"
        )


def check_indices(indices: Sequence[int], count: int) -> None:
    """Refuse indices of optimizers that do not exist."""
    unknown = [index for index in indices if not 0 <= index < count]
    if unknown:
        raise SetupError(
            f"optimizers={list(indices)!r} names {unknown[0]}, but configure_optimizers returned {count} "
            f"optimizer{'s' if count != 1 else ''}: use indices from 0 to {count - 1}, or None for all"
        )


def check_globs(
    argument: str, globs: Sequence[str] | None, names_of: Mapping[int, Sequence[str]]
) -> None:
    """Refuse globs that match no parameter.

    Args:
        argument: Name of the argument.
        globs: Its value.
        names_of: All names of each parameter.
    """
    names = [name for aliases in names_of.values() for name in aliases]
    for glob in globs or []:
        if not any(fnmatchcase(name, glob) for name in names):
            shown = ", ".join(map(repr, names[:5])) + (
                f" and {len(names) - 5} more" if len(names) > 5 else ""
            )
            raise SetupError(
                f"{argument}={list(globs or [])!r}: {glob!r} matches no parameter. The module's parameters are "
                f"{shown}; "
                'use one of these or a glob such as "conv*.weight"'
            )


def as_count(name: str, value: Any, low: int, remedy: str) -> int | None:
    """Return `value` if it is None or a whole number of at least `low`."""
    if value is None:
        return None
    if not is_count(value) or value < low:
        raise ArgumentError(f"{name} must be a whole number >= {low}, got {value!r}: {remedy}")
    return int(value)


def as_limit(name: str, value: Any) -> float | None:
    """Return `value` if it is None or a positive number."""
    if value is None:
        return None
    if not is_number(value) or not value > 0:
        raise ArgumentError(f"{name} must be a number > 0, or None for no limit, got {value!r}")
    return float(value)


def as_globs(name: str, value: Any) -> list[str] | None:
    """Return `value` if it is None or a list of strings."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise ArgumentTypeError(
            f"{name} must be a list of globs over parameter names, got {value!r}: give e.g. ['conv*']"
        )
    return list(value)


def as_indices(value: Any) -> list[int] | None:
    """Return `value` if it is None or a list of whole numbers."""
    if value is None:
        return None
    if not isinstance(value, (list, tuple)) or not all(map(is_count, value)):
        raise ArgumentTypeError(
            f"optimizers must be a list of optimizer indices, got {value!r}: give e.g. [0], or None for all"
        )
    return list(value)


def as_steps(start: Any, stop: Any) -> tuple[int, int | None]:
    """Return the first step of clipping and the one from which there is none, if they are in this order."""
    start = as_count("start_step", start, 0, "0 clips from the start") or 0
    stop = as_count("stop_step", stop, 0, "None clips to the end")
    if stop is not None and stop <= start:
        raise ArgumentError(
            f"stop_step must be greater than start_step={start}, got {stop!r}: None clips to the end"
        )
    return start, stop


def as_log(value: Any) -> Any:
    """Return `value` if it says what to log."""
    if value not in (True, False, "groups", "params"):
        raise ArgumentError(
            f'log must be true, false, "groups" or "params", got {value!r}: "groups" and "params" add norms of each'
        )
    return value
