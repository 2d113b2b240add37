"""The callback that prunes weights while they are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from clipquant.callbacks.course import as_share, check_course, share_done
from clipquant.callbacks.lightning import Callback
from clipquant.callbacks.quantize_checks import check_choice
from clipquant.callbacks.rehearsal import is_built
from clipquant.callbacks.sparsify_checks import (
    as_sparsity,
    check_beside,
    check_resumed,
    settings_of,
)
from clipquant.callbacks.telling import warn
from clipquant.keywords import naming_keywords
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.pack import pack, unpack
from clipquant.quant.codes.paths import parameter_at
from clipquant.quant.network.layers import Target, select
from clipquant.quant.training.masks import LEAST, Masks, Pattern, global_masks, layer_masks
from clipquant.quant.training.schedule import SCHEDULES
from clipquant.quant.training.scores import CRITERIA, Scores

# What others call the settings, and what they are here.
OF_PRUNING = {
    **dict.fromkeys(("amount", "sparsity", "final_sparsity", "target", "ratio"), "final={}"),
    **dict.fromkeys(("pruning_fn", "criterion", "method", "importance"), 'by="magnitude"'),
    **dict.fromkeys(("use_global_unstructured", "global_unstructured"), 'scope="global"'),
    **dict.fromkeys(("start_epoch", "start_step", "warmup"), "start, a share of the fit"),
    **dict.fromkeys(("end", "end_epoch", "end_step", "stop_step"), "stop, a share of the fit"),
    **dict.fromkeys(("n_m", "nm", "m"), 'pattern="2:4"'),
    **dict.fromkeys(("parameters_to_prune", "parameter_names", "modules"), "include=[...]"),
}
UPDATES = 100  # times that masks are chosen anew on the way to the final sparsity


class SparsifyWeights(Callback):
    """Prunes weights while they are trained: ever more of them are exactly 0.0, and stay so to the end of the fit.

    Parameters and their names stay as they are: after each optimizer step what is pruned is set to zero. The masks
    stand in this callback's own state in a checkpoint. Codes of a `QuantizationAwareTraining` and of a
    `QuantizeOnFitEnd` in the same Trainer keep the zeros exact.

    Args:
        final: Share of the weights that is pruned at the end, above 0 and below 1. None: what `pattern` says.
        start: Share of the fit, 0 to 1, at which pruning begins.
        stop: Share of the fit at which the final sparsity is reached; what is left of it mends the rest.
        schedule: How sparsity grows in between: "cubic" (fast at first), "linear" or "once".
        scope: Whether weights compete over all layers ("global") or each layer is equally sparse ("layer").
        by: What counts: a weight's "magnitude"; its "movement", by how much training has drawn it away from zero;
            or its "gradient", by how much the loss would change without it.
        include: Globs over state-dict keys; None: every weight that can be quantized.
        exclude: Globs over state-dict keys that are not pruned.
        pattern: "N:M", as "2:4": N weights kept among every M neighbours, instead of `final` and `scope`.

    Attributes:
        sparsity: State-dict key -> the share of its weights that is zero, after the last choice of masks.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    Source:
        Zhu and Gupta 2017, arXiv 1710.01878 (gradual magnitude pruning); Sanh et al. 2020, arXiv 2005.07683
        (movement); Molchanov et al. 2019, arXiv 1906.10771 (gradient); Mishra et al. 2021, arXiv 2104.08378 (2:4).

    >>> SparsifyWeights(final=1.0)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: final is the share of weights that is pruned, above 0 and below 1; got 1.0. At 1 \
nothing would be left.
    """

    @naming_keywords(OF_PRUNING)
    def __init__(
        self,
        final: float | None = None,
        *,
        start: float = 0.1,
        stop: float = 0.7,
        schedule: Literal["cubic", "linear", "once"] = "cubic",
        scope: Literal["global", "layer"] = "global",
        by: Literal["magnitude", "movement", "gradient"] = "magnitude",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        pattern: str | None = None,
    ) -> None:
        self.pattern = None if pattern is None else Pattern.of(pattern)
        self.final = as_sparsity(final, self.pattern)
        self.start, self.stop = as_share("start", start), as_share("stop", stop)
        check_choice("schedule", schedule, tuple(SCHEDULES))
        check_choice("scope", scope, ("global", "layer"))
        check_choice("by", by, tuple(CRITERIA))
        self.schedule, self.scope, self.by = schedule, scope, by
        self.include, self.exclude = include, exclude
        settings_of(self)  # checks that start is not behind stop
        self._loaded: dict[str, Any] = {}
        self._handles: list[RemovableHandle] = []
        self._masks: Masks = {}
        self._scores = Scores(by)
        self._done = 0

    @property
    def state_key(self) -> str:
        """Key in a checkpoint: callbacks for other weights keep their masks apart."""
        return self._generate_state_key(include=self.include, exclude=self.exclude)

    @property
    def sparsity(self) -> dict[str, float]:
        """State-dict key -> the share of its weights that is pruned."""
        return {n: int((~mask).sum()) / mask.numel() for n, mask in self._masks.items()}

    def pruned_names_in(self, module: nn.Module) -> set[str]:
        """Return the keys of the weights of a module that are pruned."""
        return {target.name for target in self._targets(module)}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuse, before any training, what cannot be pruned."""
        if stage != "fit":
            return
        self._forget_()
        self._loaded = {}
        check_course(trainer, "stop", self.stop)
        check_beside(trainer)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Find the weights, and go on where a checkpoint has left off."""
        if not is_built(pl_module):
            return
        targets = self._targets(pl_module)
        if self._loaded:
            check_resumed(self, self._loaded, targets)
            device = targets[0].weight.device
            self._done = self._loaded["done"]
            self._masks = {
                n: unpack(bits, 1, tuple(parameter_at(pl_module, n).shape)).bool().to(device)
                for n, bits in self._loaded["masks"].items()
            }
            self._scores.load_state_dict(self._loaded["scores"], device)
        self._follow_(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Choose masks anew where sparsity has grown."""
        share = share_done(trainer)
        if share is None:
            check_course(trainer, "stop", self.stop)
        if share is None or share < self.start or self._done >= UPDATES or not is_built(pl_module):
            return
        width = self.stop - self.start
        way = min((share - self.start) / width, 1.0) if width > 0 else 1.0
        if int(way * UPDATES) > self._done:
            self._done = int(way * UPDATES)
            self._choose_(pl_module, SCHEDULES[self.schedule](way))

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Take note of what a step says of the weights, where that is what counts."""
        if self.by != "magnitude" and self._done < UPDATES:
            own = {id(p) for group in optimizer.param_groups for p in group["params"]}
            names = self.pruned_names_in(pl_module)
            weights = {name: parameter_at(pl_module, name) for name in names}
            self._scores.add_({name: p for name, p in weights.items() if id(p) in own})

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any, **__: Any
    ) -> None:
        """Set what is pruned to zero, also where a step went around the optimizers' own hooks."""
        self.mask_(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.mask_(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the zeros in the module, and say what could not be done."""
        self.finish(pl_module)
        if trainer.global_step > 0 and not self._masks:
            warn(
                f"SparsifyWeights(start={self.start:g}) never began: the fit ended before that share of it. No weight "
                "was pruned. Set a smaller start, or let the fit go on."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._leave_()

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._leave_()

    def finish(self, pl_module: pl.LightningModule) -> None:
        """Set what is pruned to zero for the last time; asked a second time it changes nothing."""
        self._leave_()
        self.mask_(pl_module)

    def mask_(self, module: nn.Module) -> None:
        """Set what is pruned to zero, in place."""
        with torch.no_grad():
            for name, mask in self._masks.items():
                parameter = parameter_at(module, name)
                parameter.masked_fill_(~mask.to(parameter.device), 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint needs: masks, eight to a byte, scores and what was asked."""
        return {
            "settings": settings_of(self),
            "done": self._done,
            "masks": {n: pack(mask.byte().cpu(), 1) for n, mask in self._masks.items()},
            "scores": self._scores.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def _targets(self, module: nn.Module) -> tuple[Target, ...]:
        return select(module, self.include, self.exclude).targets

    def _choose_(self, module: pl.LightningModule, share: float) -> None:
        """Choose masks for a share of the final sparsity, and prune by them."""
        targets = self._targets(module)
        weights = {t.name: parameter_at(module, t.name).detach() for t in targets}
        scores = self._scores.of(weights, self._masks)
        if self.pattern is not None:
            layouts: Mapping[str, Layout] = {t.name: t.layout for t in targets}
            self._masks = self.pattern.masks(scores, layouts, share)
        elif self.scope == "global":
            self._masks = global_masks(scores, share * self.final)
            self._tell_floor_()
        else:
            self._masks = layer_masks(scores, share * self.final)
        self.mask_(module)

    def _tell_floor_(self) -> None:
        """Say once that layers were kept from being pruned whole."""
        least = LEAST * (1 - self.final)
        held = [n for n, mask in self._masks.items() if float(mask.float().mean()) <= 1.5 * least]
        if held and self._done >= UPDATES:
            warn(
                f"SparsifyWeights would have pruned {', '.join(held[:5])} whole, or nearly; a share of {least:.1%} of "
                "each is kept. Use scope='layer', a smaller final, or exclude them."
            )

    def _follow_(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Prune after every optimizer's step, also where a batch takes several."""
        self._leave_()
        for optimizer in trainer.optimizers:
            register = getattr(optimizer, "register_step_post_hook", None)
            if register is not None:
                self._handles.append(register(lambda *_: self.mask_(module)))

    def _leave_(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _forget_(self) -> None:
        self._masks, self._scores, self._done = {}, Scores(self.by), 0
