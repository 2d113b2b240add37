"""The callback that clips gradients before each optimizer step."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn
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
    check_streak,
    refuse_second_clipping,
    refuse_strategy,
    warn_of_tuners,
    warn_of_unseen_steps,
    warn_of_zero,
)
from clipquant.callbacks.clip_evaluations import Evaluations
from clipquant.callbacks.clip_figures import Log, figures, group_names, logs_now, own_name
from clipquant.callbacks.clip_folding import is_last_reader, may_fold
from clipquant.callbacks.clip_resume import (
    Resume,
    described,
    kind_of,
    public_kind,
    state_of_another_rule,
    states_of_groups,
)
from clipquant.callbacks.clip_scaler import Unscaling, divided, scaler_of
from clipquant.callbacks.clip_targets import (
    Targets,
    keep_rules_out_of_states,
    parameter_names,
    without_rules,
)
from clipquant.callbacks.lightning import Callback
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import Assignment, as_rule
from clipquant.clip.finite import OnNonfinite, check_policy
from clipquant.clip.fold import fold_, unfold_, unfold_after_step
from clipquant.clip.progress import Progress
from clipquant.clip.record import ClipRecord
from clipquant.clip.rule import Rule
from clipquant.errors import ArgumentError


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
        warn_of_zero(rule)
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
        self._evaluations: dict[int, Evaluations | None] = {}
        self._unscaling = Unscaling()
        self._resume = Resume()

    @property
    def state_key(self) -> str:
        """Key in a checkpoint: callbacks for other optimizers, parameters or rules keep their states apart."""
        return self._generate_state_key(
            optimizers=self.optimizers,
            include=self.include,
            exclude=self.exclude,
            rule=described(self.rule),
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse what cannot work before training starts, and begin anew unless a run goes on."""
        if stage != "fit":
            return
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
        names = [name for aliases in parameter_names(pl_module).values() for name in aliases]
        check_globs("include", self.include, names)
        check_globs("exclude", self.exclude, names)
        for optimizer in trainer.optimizers:
            index = self._index(trainer, optimizer)
            if index is not None:
                self._target(index, optimizer)

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
        evaluations = self._evaluations.get(index)
        if evaluations is not None and evaluations.skipping:
            return
        device = next((p.grad.device for p in assignment.params if p.grad is not None), None)
        if device is None:  # e.g. training_step returned None: there is no step to count
            return
        if evaluations is not None:
            evaluations.begin()
        record = self._clip(trainer, pl_module, index, optimizer, assignment)
        if record.deferred is not None and record.deferred < 1.0:
            fold_(optimizer, record.deferred, device)
            if index not in self._handles:
                self._handles[index] = unfold_after_step(optimizer)
        if evaluations is not None:
            evaluations.skipping = record.skipped
        self.record = record
        self._progress[index] = self._progress[index].after(record, trainer.global_step)
        streak = self._progress[index].streak
        check_streak(streak, self.max_consecutive_skips, self.on_nonfinite, scaler_of(trainer))
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
        for optimizer in trainer.optimizers:
            keep_rules_out_of_states(optimizer)
        if "optimizer_states" in checkpoint:
            checkpoint["optimizer_states"] = [
                without_rules(state) for state in checkpoint["optimizer_states"]
            ]

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
        return {
            "rule": kind_of(self.rule),
            "optimizers": {i: p.state_dict() for i, p in self._progress.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the counts, and the rule states if the rule is the same."""
        progress = {
            int(i): Progress.from_state_dict(saved) for i, saved in state_dict["optimizers"].items()
        }
        kind = public_kind(state_dict["rule"])
        if kind != kind_of(self.rule) and any(p.state for p in progress.values()):
            rank_zero_warn(
                f"the checkpoint was written with the rule {kind}, this run clips with "
                f"{kind_of(self.rule)}: counts go on, the state of the rule starts anew"
            )
            progress = {i: replace(p, state=states_of_groups(p.state)) for i, p in progress.items()}
        self._progress = progress
        self._resume.loaded = True

    def _clip(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        index: int,
        optimizer: Optimizer,
        assignment: Assignment,
    ) -> ClipRecord:
        scaler = scaler_of(trainer)
        fold = may_fold(optimizer, assignment) and is_last_reader(self, trainer, pl_module)
        folds_scaled = fold and self.skip_above is None
        factor = 1.0
        if scaler is not None:
            factor = self._unscaling.factor(scaler, optimizer, folds_scaled)
        progress = self._progress.get(index, Progress())
        if index not in self._resume.seen:
            self._resume.seen.add(index)
            progress = progress.fitting(assignment, rank_zero_warn)
        self._progress[index] = progress
        divides = factor != 1.0 and not folds_scaled
        undoes = self.on_nonfinite == "skip" and self._evaluations.get(index) is not None
        with divided(assignment.params, factor) if divides else nullcontext():
            record = clip_assigned_(
                self._active(trainer, assignment),
                progress.state,
                on_nonfinite="leave" if scaler is not None or undoes else self.on_nonfinite,
                skip_above=self.skip_above,
                measure=self.log_mode is not False,
                defer=fold and not divides,
                loss_scale=1.0 if divides else factor,
            )
        # What is not finite makes a scaler leave out the step, or has the step undone.
        left = (scaler is not None or undoes) and bool(record.nonfinite)
        return replace(record, skipped=True) if left else record

    def _index(self, trainer: pl.Trainer, optimizer: Optimizer) -> int | None:
        """Return the index of an optimizer that this callback clips; one exchanged behind the Trainer's back counts."""
        known = trainer.optimizers
        index = next((i for i, each in enumerate(known) if each is optimizer), None)
        if index is None and (len(known) == 1 or self.optimizers is None):
            index = 0 if len(known) == 1 else len(known)
        return index if self.optimizers is None or index in self.optimizers else None

    def _target(self, index: int, optimizer: Optimizer) -> Targets:
        target = self._targets.get(index)
        if target is None or target.optimizer is not optimizer:
            self._forget(index)
            check_optimizer(optimizer, self.rule)
            target = Targets(optimizer, self.rule, self.include, self.exclude)
            self._targets[index] = target
            if self.on_nonfinite == "skip" or self.skip_above is not None:
                self._evaluations[index] = Evaluations.of(optimizer)
        return target

    def _active(self, trainer: pl.Trainer, assignment: Assignment) -> Assignment:
        """Return the assignment, or one that clips nothing outside [start_step, stop_step)."""
        step = trainer.global_step
        if self.start_step <= step and (self.stop_step is None or step < self.stop_step):
            return assignment
        return replace(assignment, parts=())

    def _forget(self, index: int) -> None:
        """Leave the optimizer that had this index."""
        if index in self._handles:
            self._handles.pop(index).remove()
        evaluations = self._evaluations.pop(index, None)
        if evaluations is not None:
            evaluations.remove()
        self._targets.pop(index, None)

    def _forget_optimizers(self) -> None:
        for index in list(self._targets):
            self._forget(index)

    def _log(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, index: int, record: ClipRecord
    ) -> None:
        if self.log_mode is False or not logs_now(trainer):
            return
        suffix = own_name(self, callbacks_of(trainer))
        suffix += f"/optimizer_{index}" if len(trainer.optimizers) > 1 else ""
        groups = group_names(self._targets[index].optimizer.param_groups)
        found = figures(record, self._progress[index], suffix, self.log_mode, groups)
        pl_module.log_dict(found, on_step=True, on_epoch=False)


def callbacks_of(trainer: pl.Trainer) -> list[GradientClipCallback]:
    """Return all callbacks of this kind in a Trainer."""
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, GradientClipCallback)]
