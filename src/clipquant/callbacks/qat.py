"""The callback that trains weights as they will be stored: fake-quantized, on grids that are learned."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim import Optimizer

from clipquant.callbacks.clip_scaler import scaler_of
from clipquant.callbacks.course import as_share, check_course, share_done
from clipquant.callbacks.lightning import Callback
from clipquant.callbacks.qat_auto import choose_grids
from clipquant.callbacks.qat_checks import (
    as_weight,
    check_beside,
    check_resumed,
    check_zero_codes,
    is_compiled,
    pruned_names,
    settings_of,
)
from clipquant.callbacks.rehearsal import is_built
from clipquant.callbacks.road.guest import copy_module
from clipquant.callbacks.telling import warn
from clipquant.errors import ArgumentError
from clipquant.keywords import OF_QUANTIZING, naming_keywords
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.codes.zeros import is_pruned, with_zero
from clipquant.quant.network.layers import Target
from clipquant.quant.recipe import Recipe
from clipquant.quant.training.grid_steps import GridSteps
from clipquant.quant.training.learned_grid import LearnedGrid, first_grid
from clipquant.quant.training.swap import put_on, take_off
from clipquant.quant.training.tutor import Tutor

CALIBRATION_BATCHES = 16  # the last ones before the start, by which bits="auto" chooses

# What others call the settings, and what they are here.
OF_TRAINING = {
    **OF_QUANTIZING,
    **dict.fromkeys(("start_epoch", "start_step", "delay", "warmup"), "start, a share of the fit"),
    **dict.fromkeys(("observer_type", "qconfig", "qscheme"), "bits and granularity"),
    **dict.fromkeys(("ternary",), "bits=2, levels=2"),
}


class QuantizationAwareTraining(Callback):
    """Trains weights as they will be stored: from a share of the fit on, every forward pass sees codes on a grid.

    Parameters, their names, optimizers and checkpoints' keys stay as they are without it: the layers that hold
    weights become fake-quantized versions of their classes and are themselves again when the fit ends. Then the
    module holds the values that were trained. A `QuantizeOnFitEnd` in the same Trainer takes the grids over, so
    that what was trained is what is written.

    Args:
        bits: Width of a code, 1 to 8; "auto": for each output channel what the budgets of a
            `QuantizeOnFitEnd(bits="auto")` in the same Trainer choose at the start.
        start: Share of the fit, 0 to 1, after which weights are quantized; 0: from the first step on.
        learn_scale: Whether scales and zeros of the grids are trained too, by an Adam of their own whose rate
            follows the module's first optimizer; False: they stay as they are found at the start.
        distill: How much the outputs of the float network count, as it is at the start, beside the module's own
            loss; 0: not at all. A checkpoint then holds that network too.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights; the first match holds.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel. None: a channel
            where that holds, else the group that pays.
        levels: Number of steps of the grid, instead of the most that `bits` allow; bits=2, levels=2 is ternary.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width; pruned weights,
            those of a `SparsifyWeights` among them, get one.

    Attributes:
        trained: After the fit, state-dict key -> its `TrainedGrid`; empty if the fit ended before `start`.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    Source:
        Jacob et al. 2018, arXiv 1712.05877 (quantization-aware training); Esser et al. 2019, arXiv 1902.08153
        (LSQ: learned steps).

    >>> QuantizationAwareTraining(bits=2, start=1.5)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: start is a share of the fit, from 0 (its beginning) to 1 (its end); got 1.5.
    """

    @naming_keywords(OF_TRAINING)
    def __init__(
        self,
        bits: int | Literal["auto"] = 4,
        *,
        start: float = 0.5,
        learn_scale: bool = True,
        distill: float = 0.0,
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        overrides: dict[str, int] | None = None,
        granularity: Literal["tensor", "channel"] | int | None = None,
        levels: int | None = None,
        symmetric: bool | None = None,
    ) -> None:
        self.auto = bits == "auto"
        width = MAX_BITS if bits == "auto" else bits
        self.recipe = Recipe(
            width, levels, symmetric, granularity, "rtn", include, exclude, overrides
        )
        self.start = as_share("start", start)
        self.learn_scale = bool(learn_scale)
        self.distill = as_weight(distill)
        self.trained: Mapping[str, TrainedGrid] = {}
        self.float_metrics: Mapping[str, float] = {}
        self._batches: deque[Any] = deque(maxlen=CALIBRATION_BATCHES)
        self._grids: dict[str, LearnedGrid] = {}
        self._steps: GridSteps | None = None
        self._tutor: Tutor | None = None
        self._loaded: dict[str, Any] = {}
        self._peaks: dict[str, float] = {}  # index of an optimizer -> its largest rate so far

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what cannot be trained."""
        self._forget_()
        if stage != "fit":
            return
        self.trained, self.float_metrics = {}, {}
        check_course(trainer, "start", self.start)
        check_beside(self, trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the weights, and go on where a checkpoint has left off."""
        if is_built(pl_module):
            targets = self._targets(pl_module)
            check_zero_codes(self, trainer, pl_module, targets)
            if self._loaded.get("grids"):
                self._go_on_(pl_module, targets)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Begin to quantize where the fit has come far enough."""
        if not self._grids and is_built(pl_module):
            done = share_done(trainer)
            if done is None:
                check_course(trainer, "start", self.start)
            if self.auto:
                self._batches.append(batch)
            if self.start == 0 or (done is not None and done >= self.start):
                self._begin_(trainer, pl_module)
        if self._tutor is not None:
            self._tutor.weigh(self._factor(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move the grids of the weights that this optimizer is about to move."""
        rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        number = str(next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), 0))
        peak = self._peaks[number] = max(rate, self._peaks.get(number, 0.0))
        if self._steps is None:
            return
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        names = [name for name in self._grids if id(parameter_at(pl_module, name)) in own]
        scaler = scaler_of(trainer)
        factor = 1.0 if scaler is None else float(scaler.get_scale())
        several = trainer.world_size > 1
        mean = (lambda t: _mean(trainer, t)) if several else None
        self._steps.step_(names, rate / peak if peak else 0.0, factor, mean)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the values that were trained in the module."""
        self.finish(pl_module)
        if not self.trained and trainer.global_step > 0:
            warn(
                f"QuantizationAwareTraining(start={self.start:g}) never began: the fit ended before that share of it. "
                "The weights are those of a training in float. Set a smaller start, or let the fit go on."
            )

    def finish(self, pl_module: pl.LightningModule) -> Mapping[str, TrainedGrid]:
        """Give the layers their classes back and leave the trained values in them; return the grids.

        Asked a second time it changes nothing.
        """
        if self._grids:
            take_off(pl_module)
            self.trained = {
                name: grid.now().to(parameter_at(pl_module, name).device)
                for name, grid in self._grids.items()
            }
            hold_trained_(pl_module, self.trained)
            self._forget_()
        return self.trained

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the layers their classes back; their weights are the floats that were being trained."""
        take_off(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        take_off(pl_module)
        self._forget_()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: the grids, their optimizer's state, and what was asked."""
        state: dict[str, Any] = {
            "settings": settings_of(self),
            "peaks": dict(self._peaks),
            "float_metrics": dict(self.float_metrics),
        }
        grids = {name: grid.state_dict() for name, grid in self._grids.items()}
        if not grids and self.trained:
            return state | {
                "grids": {name: grid.state_dict() for name, grid in self.trained.items()}
            }
        if self._steps is not None:
            state |= {"grids": grids, "steps": self._steps.state_dict()}
        if self._tutor is not None:
            state |= {"float": self._tutor.state_dict()}
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict
        self._peaks = dict(state_dict.get("peaks", {}))
        self.float_metrics = dict(state_dict.get("float_metrics", {}))

    def _targets(self, pl_module: pl.LightningModule) -> list[Target]:
        return list(self.recipe.select(pl_module).targets)

    def _begin_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the grids of the weights as they are now, and quantize from here on."""
        targets = self._targets(pl_module)
        check_zero_codes(self, trainer, pl_module, targets)
        if self.distill:
            self._tutor = self._tutor_of(pl_module)
        for name, first in self._first_grids(trainer, pl_module, targets).items():
            self._grids[name] = LearnedGrid.of(first, self.learn_scale)
        self._batches.clear()
        self._put_on_(pl_module)

    def _first_grids(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, targets: list[Target]
    ) -> Mapping[str, TrainedGrid]:
        """Return the grids to begin with."""
        if self.auto:
            chosen = choose_grids(trainer, pl_module, list(self._batches))
            self.float_metrics = chosen.metrics
            return chosen.grids
        specs, masked = self.recipe.specs(targets), pruned_names(trainer, pl_module)
        if self.recipe.symmetric is None:
            zeros = [t.name for t in targets if t.name in masked or is_pruned(t.weight)]
            specs |= {name: with_zero(specs[name]) for name in zeros}
        return {t.name: first_grid(t.weight, t.layout, specs[t.name]) for t in targets}

    def _go_on_(self, pl_module: pl.LightningModule, targets: list[Target]) -> None:
        """Go on with the grids of a checkpoint."""
        check_resumed(self, self._loaded, [target.name for target in targets])
        for target in targets:
            state, device = self._loaded["grids"][target.name], target.weight.device
            self._grids[target.name] = LearnedGrid.from_state_dict(state, self.learn_scale, device)
        if self.distill:
            self._tutor = self._tutor_of(pl_module)
            self._tutor.load_state_dict(self._loaded.get("float", {}))
        self._put_on_(pl_module)
        if self._steps is not None:
            self._steps.load_state_dict(self._loaded.get("steps", {}))

    def _put_on_(self, pl_module: pl.LightningModule) -> None:
        put_on(pl_module, self._grids)
        self._steps = GridSteps(self._grids)
        if self._tutor is not None:
            self._tutor.attach_(pl_module)
        if is_compiled(pl_module):
            torch.compiler.reset()  # what was compiled reads the weights themselves

    def _tutor_of(self, pl_module: pl.LightningModule) -> Tutor:
        if is_compiled(pl_module):
            raise ArgumentError(
                f"distill needs outputs that a compiled module does not show; got distill={self.distill:g} beside "
                "torch.compile. Set distill=0, or train uncompiled."
            )
        return Tutor(copy_module(pl_module), self.distill)

    def _evaluate_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run a checkpoint's weights as they were trained, where one is evaluated by itself."""
        fitting = trainer.state.fn == "fit"
        if not fitting and self._loaded.get("grids") and not self._grids:
            for name, state in self._loaded["grids"].items():
                device = parameter_at(pl_module, name).device
                self._grids[name] = LearnedGrid.from_state_dict(state, False, device)
            put_on(pl_module, self._grids)

    def _factor(self, trainer: pl.Trainer) -> float:
        """Return what a batch's loss is multiplied by before its backward pass."""
        scaler = scaler_of(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        return scale / max(trainer.accumulate_grad_batches, 1)

    def _forget_(self) -> None:
        if self._tutor is not None:
            self._tutor.detach_()
        self._grids, self._steps, self._tutor = {}, None, None
        self._loaded, self._peaks = {}, {}


def hold_trained_(module: torch.nn.Module, trained: Mapping[str, TrainedGrid]) -> None:
    """Give weights the values that their trained grids make of them, in place.

    Args:
        module: Any module that holds them.
        trained: State-dict key -> grid.
    """
    with torch.no_grad():
        for name, grid in trained.items():
            parameter = parameter_at(module, name)
            parameter.copy_(dequantize(grid.to(parameter.device).tensor(parameter)))


def _mean(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
    return reduced
