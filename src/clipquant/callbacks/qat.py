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
    forget_compiled,
    is_compiled,
    pruned_names,
    settings_of,
)
from clipquant.callbacks.quantize_checks import check_choice
from clipquant.callbacks.rehearsal import is_built
from clipquant.callbacks.road.guest import copy_module
from clipquant.callbacks.road.ranks import gathered
from clipquant.callbacks.telling import warn
from clipquant.errors import ArgumentError
from clipquant.keywords import OF_QUANTIZING, naming_keywords
from clipquant.quant.codes.spec import MAX_BITS
from clipquant.quant.codes.trained import TrainedGrid
from clipquant.quant.codes.zeros import is_pruned, with_zero
from clipquant.quant.network.layers import Target
from clipquant.quant.recipe import Recipe
from clipquant.quant.training.learned_grid import first_grid
from clipquant.quant.training.running import Running
from clipquant.quant.training.swap import take_off
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
        activations: 8: the inputs of linear and convolution layers are fake-quantized too, from 16 batches after
            the start on, on ranges that are learned; an export "onnx-int8" computes with these. None: they
            stay in float, as they do in the module after the fit.

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
        activations: Literal[8] | None = None,
    ) -> None:
        self.auto = bits == "auto"
        width = MAX_BITS if bits == "auto" else bits
        self.recipe = Recipe(
            width, levels, symmetric, granularity, "rtn", include, exclude, overrides
        )
        self.start = as_share("start", start)
        self.learn_scale = bool(learn_scale)
        self.distill = as_weight(distill)
        check_choice("activations", activations, (8, None))
        self.activations = activations
        self.trained: Mapping[str, TrainedGrid] = {}
        self.float_metrics: Mapping[str, float] = {}
        self._batches: deque[Any] = deque(maxlen=CALIBRATION_BATCHES)
        self._running: Running | None = None
        self._lost = False  # the grids, when the fit was over
        self._loaded: dict[str, Any] = {}
        self._peaks: dict[str, float] = {}  # index of an optimizer -> its largest rate so far

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what cannot be trained."""
        self._forget_()
        if stage != "fit":
            return
        self.trained, self.float_metrics, self._lost = {}, {}, False
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
        if self._running is None and is_built(pl_module):
            done = share_done(trainer)
            if done is None:
                check_course(trainer, "start", self.start)
            if self.auto:
                self._batches.append(batch)
            if self.start == 0 or (done is not None and done >= self.start):
                self._begin_(trainer, pl_module)
        elif self._running is not None:
            self._running.begin_inputs_(_mean_of_all)
        if self._running is not None and self._running.tutor is not None:
            self._running.tutor.weigh(self._factor(trainer))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Move the grids of the weights that this optimizer is about to move."""
        rate = max((float(group["lr"]) for group in optimizer.param_groups), default=0.0)
        number = str(next((i for i, o in enumerate(trainer.optimizers) if o is optimizer), 0))
        peak = self._peaks[number] = max(rate, self._peaks.get(number, 0.0))
        if self._running is not None:
            scaler, several = scaler_of(trainer), trainer.world_size > 1
            factor = 1.0 if scaler is None else float(scaler.get_scale())
            mean = (lambda t: _mean(trainer, t)) if several else None
            share = rate / peak if peak else 0.0
            self._running.step_(pl_module, optimizer, share, factor, mean)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._evaluate_(trainer, pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the values that were trained in the module."""
        self.finish(pl_module)
        if not self.trained and not self._lost and trainer.global_step > 0:
            warn(
                f"QuantizationAwareTraining(start={self.start:g}) never began: the fit ended before that share of it. "
                "The weights are those of a training in float. Set a smaller start, or let the fit go on."
            )

    def finish(self, pl_module: pl.LightningModule) -> Mapping[str, TrainedGrid]:
        """Give the layers their classes back and leave the trained values in them; return the grids.

        Asked a second time it changes nothing. A fit that is over is not lost by what goes wrong here: the weights
        stay as they stand, and one warning says so.
        """
        if self._running is not None:
            try:
                self.trained = self._running.finish_(pl_module)
            except Exception as error:
                self._lost = True
                take_off(pl_module)
                warn(
                    "QuantizationAwareTraining could not put the trained weights on their grids "
                    f"({type(error).__name__}: {error}); the module holds the float weights that were being trained."
                )
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
        if self._running is not None:
            return state | self._running.state_dict()
        grids = {name: grid.state_dict() for name, grid in self.trained.items()}
        return state | {"grids": grids} if grids else state

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
        tutor = self._tutor_of(pl_module)
        if self.activations is not None and is_compiled(pl_module):
            raise ArgumentError(
                f"activations={self.activations} needs inputs that a compiled module does not show. Leave it out, or "
                "train uncompiled."
            )
        first = self._first_grids(trainer, pl_module, targets)
        self._batches.clear()
        activations = self.activations is not None
        self._running = Running.begin(pl_module, first, self.learn_scale, activations, tutor)
        forget_compiled(pl_module)

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
        tutor = self._tutor_of(pl_module)
        self._running = Running.from_state_dict(self._loaded, pl_module, self.learn_scale, tutor)
        forget_compiled(pl_module)

    def _tutor_of(self, pl_module: pl.LightningModule) -> Tutor | None:
        """Return the float network as it is now, where it shall teach."""
        if not self.distill:
            return None
        if is_compiled(pl_module):
            raise ArgumentError(
                f"distill needs outputs that a compiled module does not show; got distill={self.distill:g} beside "
                "torch.compile. Set distill=0, or train uncompiled."
            )
        return Tutor(copy_module(pl_module), self.distill)

    def _evaluate_(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Run a checkpoint's weights as they were trained, where one is evaluated by itself."""
        fitting = trainer.state.fn == "fit"
        if not fitting and self._loaded.get("grids") and self._running is None:
            self._running = Running.from_state_dict(self._loaded, pl_module, learn=False)

    def _factor(self, trainer: pl.Trainer) -> float:
        """Return what a batch's loss is multiplied by before its backward pass."""
        scaler = scaler_of(trainer)
        scale = 1.0 if scaler is None else float(scaler.get_scale())
        return scale / max(trainer.accumulate_grad_batches, 1)

    def _forget_(self) -> None:
        if self._running is not None:
            self._running.detach_()
        self._running, self._loaded, self._peaks = None, {}, {}


def _mean(trainer: pl.Trainer, tensor: Tensor) -> Tensor:
    reduced: Tensor = trainer.strategy.reduce(tensor, reduce_op="mean")
    return reduced


def _mean_of_all(tensor: Tensor) -> Tensor:
    return torch.stack(gathered(tensor.cpu())).mean(0)
