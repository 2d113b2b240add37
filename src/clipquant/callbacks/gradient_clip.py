"""The callback that clips gradients before each optimizer step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch.optim import Optimizer

from clipquant.callbacks.clip_attached import Attached
from clipquant.callbacks.clip_checks import (
    as_count,
    as_globs,
    as_indices,
    as_limit,
    as_log,
    as_steps,
    check_globs,
    check_indices,
    check_optimizer,
    check_streak,
    refuse_second_clipping,
    refuse_strategy,
    refuse_twins,
    refuse_zero,
    warn_of_tuners,
    warn_of_unseen_steps,
)
from clipquant.callbacks.clip_figures import Log, figures, group_names, logs_now, own_name
from clipquant.callbacks.clip_folding import is_last_reader, may_fold, policy_on
from clipquant.callbacks.clip_keywords import naming_remedies
from clipquant.callbacks.clip_resume import (
    Resume,
    restored,
    saved,
    settings_in_key,
    state_of_another_rule,
)
from clipquant.callbacks.clip_scaler import Unscaling, divided, scaler_of
from clipquant.callbacks.clip_targets import (
    Targets,
    index_of,
    keep_rules_out_of_checkpoint,
    parameter_names,
    within,
)
from clipquant.callbacks.lightning import Callback
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import Assignment, as_rule
from clipquant.clip.finite import OnNonfinite, check_policy
from clipquant.clip.fold import supports_scaling, unfold_
from clipquant.clip.progress import Progress
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import Rule
from clipquant.clip.unread import UnreadRecord


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
        TypeError: `rule` is no rule, a list was expected, or there is no argument of this name.
        ValueError: A value is out of range, or `rule` is the number 0, which means two things.

    Example:
        >>> trainer = pl.Trainer(callbacks=[GradientClipCallback(1.0)], logger=False, accelerator="cpu")
    """

    @naming_remedies
    def __init__(
        self,
        rule: int | float | Rule = 1.0,  # noqa: PYI041 - a YAML file's -1 is shown as it was written
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
        refuse_zero(rule)
        self.rule = as_rule(rule)
        self.on_nonfinite = check_policy(on_nonfinite)
        self.max_consecutive_skips = as_count(
            "max_consecutive_skips", max_consecutive_skips, 0, "None for no limit"
        )
        self.skip_above = as_limit("skip_above", skip_above)
        self.include = as_globs("include", include)
        self.exclude = as_globs("exclude", exclude)
        self.optimizers = as_indices(optimizers)
        self.start_step, self.stop_step = as_steps(start_step, stop_step)
        self.log_mode: Log = as_log(log)
        self.record: ClipRecord | None = None
        self._progress: dict[int, Progress] = {}
        self._attached: dict[int, Attached] = {}
        self._unscaling = Unscaling()
        self._resume = Resume()

    @property
    def state_key(self) -> str:
        """Key in a checkpoint: callbacks for other optimizers, parameters or rules keep their states apart.

        Until `setup`, which refuses equal keys with a remedy, it is this object's alone, so that a Trainer is made.
        """
        alone = {} if self._resume.set_up else {"object": id(self)}
        return self._generate_state_key(**settings_in_key(self), **alone)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before training starts, and begin anew unless a run goes on."""
        self._resume.set_up = True
        if stage != "fit":
            return
        refuse_twins(self, callbacks_of(trainer))
        refuse_second_clipping(trainer)
        refuse_strategy(trainer)
        warn_of_tuners(trainer)
        if not self._resume.goes_on(trainer, pl_module):
            self._progress, self.record = {}, None

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check globs, optimizer indices and optimizers, which exist from here on."""
        self._forget_optimizers()
        if self.optimizers is not None:
            check_indices(self.optimizers, len(trainer.optimizers))
        names = parameter_names(pl_module)
        check_globs("include", self.include, names)
        check_globs("exclude", self.exclude, names)
        for optimizer in trainer.optimizers:
            index = index_of(optimizer, trainer.optimizers, self.optimizers)
            if index is not None:
                self._attach(index, optimizer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Clip the gradients of this optimizer.

        Raises:
            FloatingPointError: A gradient is not finite, under "raise".
            RuntimeError: More steps in a row were skipped than `max_consecutive_skips`.
        """
        index = index_of(optimizer, trainer.optimizers, self.optimizers)
        if index is None:
            return
        unfold_(optimizer)
        attached = self._attach(index, optimizer)
        if attached.skipping:
            return
        assignment = attached.targets.assignment(pl_module)
        device = next((p.grad.device for p in assignment.params if p.grad is not None), None)
        if device is None:  # e.g. training_step returned None: there is no step to count
            return
        attached.begin()
        record = self._clip(trainer, pl_module, index, attached, assignment, device)
        attached.end(record, device)
        self.record = record
        progress = self._progress[index].after(record, trainer.global_step)
        logs = self.log_mode is not False and logs_now(trainer)
        self._progress[index] = progress.settled() if logs else progress
        streak = self._progress[index].streak
        check_streak(streak, self.max_consecutive_skips, self.on_nonfinite, scaler_of(trainer))
        if logs:
            self._log(trainer, pl_module, index, record)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say so where training ran and steps were taken that the callback never saw."""
        chosen = range(len(trainer.optimizers)) if self.optimizers is None else self.optimizers
        warn_of_unseen_steps(trainer, [i for i in chosen if i not in self._resume.seen])

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizers as they were: no teardown follows."""
        self.teardown(trainer, pl_module, "fit")

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Leave the optimizers as they were."""
        for optimizer in trainer.optimizers:
            unfold_(optimizer)
        self._forget_optimizers()
        self._resume.end(pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the rules of parameter groups out of the file, whoever asked for it and when."""
        keep_rules_out_of_checkpoint(trainer.optimizers, checkpoint)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take over the state of a callback for the same parameters whose rule was another."""
        claimed = [callback.state_key for callback in callbacks_of(trainer)]
        state = state_of_another_rule(checkpoint.get("callbacks", {}), self.state_key, claimed)
        if state is not None:
            self.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs to go on bit for bit: counts and rule states of each optimizer."""
        return saved(self.rule, self._progress)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts, and the rule states if the rule is the same."""
        self._progress = restored(self.rule, state_dict)
        self._resume.loaded = True

    def _clip(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        index: int,
        attached: Attached,
        assignment: Assignment,
        device: torch.device,
    ) -> ClipRecord:
        scaler, optimizer = scaler_of(trainer), attached.optimizer
        fold = may_fold(optimizer, assignment) and is_last_reader(self, trainer, pl_module)
        folds_scaled = fold and self.skip_above is None
        factor = 1.0
        if scaler is not None:
            factor = self._unscaling.factor(scaler, optimizer, folds_scaled)
        progress = self._resume.begun(index, self._progress, assignment)
        # A fused step writes the gradients back, so that nothing could be measured after it.
        later = not (supports_scaling(optimizer) or logs_now(trainer))
        divides = factor != 1.0 and not folds_scaled
        undoes = self.on_nonfinite == "skip" and attached.evaluations is not None
        policy = policy_on(device, self, trainer, pl_module, optimizer)
        with divided(assignment.params, factor) if divides else nullcontext():
            record = clip_assigned_(
                within(assignment, trainer.global_step, self.start_step, self.stop_step),
                progress.state,
                on_nonfinite="leave" if scaler is not None or undoes else policy,
                skip_above=self.skip_above,
                measure=self.log_mode is not False,
                defer=fold and not divides,
                loss_scale=1.0 if divides else factor,
                later=later and not divides,
            )
        if isinstance(record, UnreadRecord) or not (scaler is not None or undoes):
            return record
        # What is not finite makes a scaler leave out the step, or has the step undone.
        return replace(record, skipped=True) if record.nonfinite else record

    def _attach(self, index: int, optimizer: Optimizer) -> Attached:
        attached = self._attached.get(index)
        if attached is None or attached.optimizer is not optimizer:
            if attached is not None:
                attached.remove()
            check_optimizer(optimizer, self.rule)
            targets = Targets(optimizer, self.rule, self.include, self.exclude)
            skips = self.on_nonfinite == "skip" or self.skip_above is not None
            attached = self._attached[index] = Attached(targets, skips)
        return attached

    def _forget_optimizers(self) -> None:
        for index in list(self._attached):
            self._attached.pop(index).remove()

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, record: ClipRecord
    ) -> None:
        suffix = own_name(self, callbacks_of(trainer))
        suffix += f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        groups = group_names(self._attached[index].optimizer.param_groups)
        found = figures(record, self._progress[index], suffix, self.log_mode, groups)
        pl_module.log_dict(found, on_step=True, on_epoch=False)


def callbacks_of(trainer: pl.Trainer) -> list[GradientClipCallback]:
    """Return all callbacks of this kind in a Trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, GradientClipCallback)]
