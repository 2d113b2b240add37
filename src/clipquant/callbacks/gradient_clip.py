"""The callback that clips gradients before each optimizer step."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clipquant.callbacks.clip_checks import (
    as_count,
    as_globs,
    as_indices,
    as_limit,
    check_globs,
    check_indices,
    check_optimizer,
    refuse_second_clipping,
    refuse_strategy,
)
from clipquant.callbacks.clip_figures import Log, figures, logs_now
from clipquant.callbacks.clip_targets import Targets, parameter_names
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import Assignment, as_rule
from clipquant.clip.finite import OnNonfinite, check_policy
from clipquant.clip.fold import can_fold, fold_, unfold_, unfold_after_step
from clipquant.clip.progress import Progress
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import Rule
from clipquant.errors import ArgumentError, RunError


class GradientClipCallback(Callback):
    """Clip gradients before every optimizer step; a step without clipping leaves them bit for bit.

    It runs in `on_before_optimizer_step`, after accumulation, gradient synchronisation and AMP unscaling, under
    automatic and manual optimization. A parameter group may bring its own rule under the key "clip".

    Args:
        rule: What clips; a number c means `Value(c)`: clamp every gradient element to [-c, c].
        on_nonfinite: What NaN or infinite gradients lead to: "skip" leaves out the step, parameters and optimizer
            state stay as they are; "zero" zeroes the non-finite elements; "raise" raises; "propagate" lets them
            through. Under a GradScaler an overflow is left to the scaler.
        max_consecutive_skips: Raise when more steps than this are skipped one after the other; None for no limit.
        skip_above: Skip a step whose gradient norm is above this; None for no limit.
        include: Globs over parameter names; only these are clipped. None for all.
        exclude: Globs over parameter names; these are not clipped.
        optimizers: Indices of the optimizers whose gradients are clipped; None for all.
        start_step: First value of `trainer.global_step` at which the rule clips.
        stop_step: Value of `trainer.global_step` from which the rule clips no more; None for never.
        log: Whether to log `grad_norm`, `grad_norm_clipped`, `clip_coef`, `clip_rate` and `skipped_steps` on the
            Trainer's logging steps; "groups" or "params" adds norms for each parameter group or parameter.

    Attributes:
        record: `ClipRecord` of the last step, None before the first.

    Raises:
        TypeError: `rule` is no rule, or a list was expected.
        ValueError: A value is out of range.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientClipCallback(1.0)], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        rule: float | Rule = 1.0,
        *,
        on_nonfinite: OnNonfinite = "skip",
        max_consecutive_skips: int | None = 10,
        skip_above: float | None = None,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        optimizers: list[int] | None = None,
        start_step: int = 0,
        stop_step: int | None = None,
        log: Log = True,
    ) -> None:
        self.rule = as_rule(rule)
        self.on_nonfinite = check_policy(on_nonfinite)
        self.max_consecutive_skips = as_count(
            "max_consecutive_skips", max_consecutive_skips, 0, "None for no limit"
        )
        self.skip_above = as_limit("skip_above", skip_above)
        self.include = as_globs("include", include)
        self.exclude = as_globs("exclude", exclude)
        self.optimizers = as_indices(optimizers)
        self.start_step = as_count("start_step", start_step, 0, "0 clips from the start") or 0
        self.stop_step = as_count("stop_step", stop_step, 0, "None clips to the end")
        if stop_step is not None and stop_step <= self.start_step:
            raise ArgumentError(
                f"stop_step must be greater than start_step={start_step}, got {stop_step!r}"
            )
        if log not in (True, False, "groups", "params"):
            raise ArgumentError(f'log must be true, false, "groups" or "params", got {log!r}')
        self.log_mode: Log = log
        self.record: ClipRecord | None = None
        self._progress: dict[int, Progress] = {}
        self._targets: dict[int, Targets] = {}
        self._handles: dict[int, RemovableHandle] = {}

    @property
    def state_key(self) -> str:
        """Key in a checkpoint: callbacks for different optimizers or parameters keep their states apart."""
        return self._generate_state_key(
            optimizers=self.optimizers, include=self.include, exclude=self.exclude
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work, before training starts."""
        if stage == "fit":
            refuse_second_clipping(trainer)
            refuse_strategy(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check globs, optimizer indices and optimizers, which exist from here on."""
        self._forget_optimizers()
        if self.optimizers is not None:
            check_indices(self.optimizers, len(trainer.optimizers))
        names = [name for aliases in parameter_names(pl_module).values() for name in aliases]
        check_globs("include", self.include, names)
        check_globs("exclude", self.exclude, names)
        for index, optimizer in enumerate(trainer.optimizers):
            if self._index(trainer, optimizer) is not None:
                self._target(index, optimizer)
                check_optimizer(optimizer, self.rule)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip the gradients of this optimizer.

        Raises:
            FloatingPointError: A gradient is not finite, under "raise".
            RuntimeError: More steps in a row were skipped than `max_consecutive_skips`.
        """
        index = self._index(trainer, optimizer)
        if index is None:
            return
        unfold_(optimizer)
        assignment = self._target(index, optimizer).assignment(pl_module)
        device = next((p.grad.device for p in assignment.params if p.grad is not None), None)
        if device is None:  # e.g. training_step returned None: there is no step to count
            return
        scaler = _scaler(trainer)
        fold = self._folds(trainer, pl_module, optimizer, assignment)
        loss_scale = 1.0
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            if fold and self.skip_above is None:
                loss_scale = scaler.get_scale()
            else:
                scaler.unscale_(optimizer)
        progress = self._progress.get(index, Progress())
        record = clip_assigned_(
            self._active(trainer, assignment),
            progress.state,
            on_nonfinite=self.on_nonfinite if scaler is None else "leave",
            skip_above=self.skip_above,
            measure=self.log_mode is not False,
            defer=fold,
            loss_scale=loss_scale,
        )
        if record.deferred is not None and record.deferred < 1.0:
            fold_(optimizer, record.deferred, device)
            if index not in self._handles:
                self._handles[index] = unfold_after_step(optimizer)
        self.record = record
        self._progress[index] = progress.after(record, trainer.global_step)
        self._check_streak(self._progress[index])
        self._log(trainer, pl_module, index, record)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        for optimizer in trainer.optimizers:
            unfold_(optimizer)
        for targets in self._targets.values():
            targets.give_back()
        self._forget_optimizers()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit: counts and rule states of each optimizer."""
        return {
            "rule": _kind(self.rule),
            "optimizers": {i: p.state_dict() for i, p in self._progress.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts, and the rule states if the rule is the same."""
        progress = {
            int(i): Progress.from_state_dict(saved) for i, saved in state_dict["optimizers"].items()
        }
        kind = _public(state_dict["rule"])
        if kind != _kind(self.rule) and any(p.state for p in progress.values()):
            rank_zero_warn(
                f"the checkpoint was written with the rule {kind}, this run clips with "
                f"{_kind(self.rule)}: counts go on, the state of the rule starts anew"
            )
            progress = {i: replace(p, state={}) for i, p in progress.items()}
        self._progress = progress

    def _index(self, trainer: pl.Trainer, optimizer: Optimizer) -> int | None:
        """Return the index of an optimizer that this callback clips."""
        for index, known in enumerate(trainer.optimizers):
            if known is optimizer and (self.optimizers is None or index in self.optimizers):
                return index
        return None

    def _target(self, index: int, optimizer: Optimizer) -> Targets:
        if index not in self._targets:
            self._targets[index] = Targets(optimizer, self.rule, self.include, self.exclude)
        return self._targets[index]

    def _active(self, trainer: pl.Trainer, assignment: Assignment) -> Assignment:
        """Return the assignment, or one that clips nothing outside [start_step, stop_step)."""
        step = trainer.global_step
        if self.start_step <= step and (self.stop_step is None or step < self.stop_step):
            return assignment
        return replace(assignment, parts=())

    def _folds(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: Optimizer,
        assignment: Assignment,
    ) -> bool:
        """Return whether the step itself may scale the gradients: nobody else reads or scales them in between."""
        part = assignment.whole
        return (
            part is not None
            and bool(getattr(part.rule, "folds", False))
            and can_fold(optimizer)
            and not any(is_overridden(hook, pl_module) for hook in _LATER_HOOKS)
            and not any(
                is_overridden(_LATER_HOOKS[0], cb, Callback)
                for cb in _callbacks_after(trainer, self)
            )
        )

    def _check_streak(self, progress: Progress) -> None:
        limit = self.max_consecutive_skips
        if limit is not None and len(progress.streak) > limit:
            history = "\n  ".join(map(str, progress.streak))
            raise RunError(
                f"{len(progress.streak)} steps in a row were skipped, max_consecutive_skips={limit} allows {limit}: "
                "lower the learning rate, look for the cause with torch.autograd.set_detect_anomaly(True), "
                f"or raise the limit.\n  {history}"
            )

    def _forget_optimizers(self) -> None:
        for handle in self._handles.values():
            handle.remove()
        self._handles, self._targets = {}, {}

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, record: ClipRecord
    ) -> None:
        if self.log_mode is False or not logs_now(trainer):
            return
        suffix = f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        found = figures(record, self._progress[index], suffix, self.log_mode)
        pl_module.log_dict(found, on_step=True, on_epoch=False)


_LATER_HOOKS = ("on_before_optimizer_step", "configure_gradient_clipping")


def _kind(rule: Rule) -> str:
    return _public(f"{type(rule).__module__}.{type(rule).__qualname__}")


def _public(kind: str) -> str:
    """Return the path of a rule's class; that of this package's rules without the file that they stand in."""
    return re.sub(r"^clipquant\.clip\..*\.", "clipquant.clip.", kind)


def _scaler(trainer: pl.Trainer) -> torch.amp.GradScaler | None:
    """Return the gradient scaler in use, if any."""
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return scaler if scaler is not None and scaler.is_enabled() else None


def _callbacks_after(trainer: pl.Trainer, callback: Callback) -> list[Callback]:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks[callbacks.index(callback) + 1 :]
