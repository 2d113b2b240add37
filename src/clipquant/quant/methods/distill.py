"""Distill: quantized weights trained, without labels, on the outputs of the float network or of a teacher."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from clipquant.errors import ArgumentError
from clipquant.quant.codes.straight import Latent
from clipquant.quant.methods.base import Found, Method, Problem, matrix_of, solved
from clipquant.quant.network.batchnorm import reestimate
from clipquant.quant.network.calibration import Calibration, EndLoop
from clipquant.quant.network.layers import bias_of, check_finite, tied_keys
from clipquant.quant.network.twin import Twin
from clipquant.quant.network.wanted import Loss, Wanted

_OF_GRID, _OF_FLOATS = 0.2, 0.2  # rates of grids and of what stays in float, as shares of the rate
_PASSES = 50  # most times that a batch is learned from
_FALL = 0.99  # share of the lowest mean so far below which that of a pass counts as lower


@dataclass(frozen=True)
class Distill(Method):
    """Train codes, grids and biases, without labels, until the outputs are those of the float network.

    Learning starts from another method's codes. Each step runs one calibration batch and moves latent
    codes, which are rounded on the way forward (straight through), scales and zeros, and every
    one-dimensional parameter that stays in float: biases, and the weights of normalizations. BatchNorm
    statistics are frozen meanwhile, re-estimated before for the first codes and after for the last.
    The batches are gone through again and again, every fourth held apart: more
    `calibration_batches` are more to learn from. On those held apart, or on all where there are fewer
    than four, the outcome must be nearer to what is wanted than the start; else the start is kept, as
    it is after a loss that is NaN or infinite, and the report says so.

    Args:
        steps: Steps of Adam, its rate falling to 0 by a cosine; no batch is learned from more than 50 times.
        seconds: Most seconds that they may take, without the start's; None: no limit. With a limit that
            is reached, two runs may differ.
        rate: The first rate of the codes, in steps of their grid.
        patience: Passes over the batches without a loss that is lower by 1 %, after which learning stops.
        loss: "mse", the mean squared difference of the outputs as a share of their variance; "kl", the
            divergence of their softmax over the last axis; "auto", the sum of both for logits and "mse"
            for all else. An output counts as logits if it has two axes or more, and its softmax gives
            the likeliest class a probability of one half or more, on average over a batch.
        seed: Of the order of the batches.
        teacher: Another network, whose outputs are wanted instead: a module, or the path of a checkpoint of a
            network of the model's own class. It is run, frozen and in eval mode, on what the model's own
            `forward` is given.
        start: Where to start. None: `auto`, without what it would distill itself.
        labels: Whether the loss that the module computes of its own is trained on too: what `validation_step`
            returns, or in `quantize` what `forward(model, batch)` does.

    Raises:
        ValueError: For a knob that cannot be; from `solve`, for a teacher with outputs of other shapes.

    Source:
        Hinton et al. 2015, arXiv 1503.02531 (distillation); Esser et al. 2019, arXiv 1902.08153 (LSQ).

    >>> Distill(steps=0)
    Traceback (most recent call last):
    ...
    clipquant.errors.ArgumentError: steps must be a whole number, 1 or more; got 0.
    """

    steps: int = 200
    seconds: float | None = None
    rate: float = 0.006
    patience: int = 8
    loss: Loss = "auto"
    seed: int = 0
    teacher: nn.Module | str | Path | None = field(default=None, repr=False)
    start: Method | None = None
    labels: bool = False
    name: ClassVar[str] = "distill"
    needs_data: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "from another method's codes on, trains codes, grids and biases on the float network's outputs"
    )

    def __post_init__(self) -> None:
        _check(self)

    def solve(self, problem: Problem) -> Found:
        """Return trained codes and float parameters, or those that training started from.

        Raises:
            ValueError: If the teacher's outputs are of other shapes than the model's.
            TypeError: If the model's outputs for a batch hold no floating tensor.
        """
        check_finite(problem.targets)
        wanted = self.wanted(problem)
        wanted.check_teacher()
        wanted.check_labels()
        return self.learned(problem, solved(self._first(), problem), wanted)

    def wanted(self, problem: Problem) -> Wanted:
        """Return what is wanted of a problem's network."""
        if isinstance(self.teacher, (str, Path)):
            raise ArgumentError(
                f"a teacher on disk is read by quantize() and QuantizeOnFitEnd; got the path {str(self.teacher)!r} in "
                "a method that is solved by itself. Give it the module."
            )
        last = problem.targets[-1].name.rpartition(".")[0]
        knobs = (self.teacher, self.loss, self.seed, self.labels)
        return Wanted(problem.model, problem.data, last, *knobs)

    def _first(self) -> Method:
        """Return what codes are learned from."""
        if self.start is not None:
            return self.start
        from clipquant.quant.methods.auto import Auto  # which distills itself

        return Auto(distilled=0)

    def learned(self, problem: Problem, start: Found, wanted: Wanted) -> Found:
        """Return what is trained from `start` on, or `start` where that is no nearer to what is wanted."""
        pupil = _Pupil(problem, start)
        before = wanted.mean_error(pupil.twin)
        course = _Course(self, wanted.calibration)
        self._learn(pupil, wanted, course)
        names = [target.name for target in problem.targets]
        if course.failed:
            return start.noted(names, f"distillation left out: {course.said}")
        found = pupil.found(start)
        pupil.twin.hold_(problem.twin(found).tensors)
        after = wanted.mean_error(pupil.twin)
        told = f"loss {before:.3g} before, {after:.3g} after {course.said}, {wanted.judged}"
        if not after < before:
            return start.noted(names, f"distillation left out: {told}")
        return found.noted(names, f"distilled: {told}")

    def _learn(self, pupil: _Pupil, wanted: Wanted, course: _Course) -> None:
        calibration = wanted.calibration
        leaves = list(pupil.leaves(self.rate))
        tensors = [leaf.requires_grad_(True) for _, leaf in leaves]
        groups = [{"params": [leaf], "lr": rate, "peak": rate} for rate, leaf in leaves]
        optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95))

        def visit(number: int, batch: Any) -> None:
            calibration.tell("distillation", course.step, course.steps)
            share = course.rate_now()
            for params in optimizer.param_groups:
                params["lr"] = params["peak"] * share
            with torch.enable_grad():
                pupil.hold_()
                error = wanted.error(pupil.twin, number, batch)
                slopes = torch.autograd.grad(error, tensors, allow_unused=True)
            course.check_finite([error.detach(), *(s for s in slopes if s is not None)])
            for leaf, slope in zip(tensors, slopes, strict=True):
                leaf.grad = slope
            optimizer.step()
            pupil.limit_()
            course.went(float(error.detach()))

        calibration.each(visit, course.order())
        for leaf in tensors:
            leaf.requires_grad_(False)


class _Course:
    """How learning goes: the steps taken, and why it ended; it ends by raising `EndLoop`."""

    def __init__(self, knobs: Distill, calibration: Calibration) -> None:
        self.knobs, self.began = knobs, time.monotonic()
        self.batches = [n for n in range(len(calibration)) if calibration.fitted(n)]
        self.steps = min(knobs.steps, _PASSES * len(self.batches))
        self.step, self.failed, self.said = 0, False, "1 step"
        self.errors: list[float] = []  # of this pass
        self.lowest, self.waited = math.inf, 0

    def order(self) -> list[int]:
        """Return the numbers of the batches in an order drawn anew for each pass, one for each step."""
        generator = torch.Generator("cpu").manual_seed(self.knobs.seed)
        found: list[int] = []
        while len(found) < self.steps:
            drawn = torch.randperm(len(self.batches), generator=generator, device="cpu").tolist()
            found += [self.batches[i] for i in drawn]
        return found[: self.steps]

    def rate_now(self) -> float:
        """Return the share of its first value that the rate has come down to."""
        done = self.step / self.steps
        if self.knobs.seconds is not None:
            done = max(done, (time.monotonic() - self.began) / self.knobs.seconds)
            if done >= 1:
                self._end(f"{self.step} steps, when its {self.knobs.seconds:g} seconds were up")
        return (1 + math.cos(math.pi * done)) / 2

    def check_finite(self, tensors: Sequence[Tensor]) -> None:
        if not bool(torch.stack([t.float().sum() for t in tensors]).isfinite().all()):
            self.failed = True
            self._end(f"its loss or a gradient was NaN or infinite at step {self.step + 1}")

    def went(self, error: float) -> None:
        """Take note of a step's loss; after a pass over all batches look whether it still falls."""
        self.step += 1
        self.said = f"{self.step} steps"
        self.errors.append(error)
        if len(self.errors) < len(self.batches):
            return
        mean = sum(self.errors) / len(self.errors)
        self.errors.clear()
        self.waited = 0 if mean < _FALL * self.lowest else self.waited + 1
        self.lowest = min(mean, self.lowest)
        if self.waited >= self.knobs.patience:
            self._end(f"{self.step} steps, when it fell no more")

    def _end(self, said: str) -> None:
        self.said = said
        raise EndLoop


class _Pupil:
    """The quantized network while it is trained."""

    def __init__(self, problem: Problem, start: Found) -> None:
        self.targets = {target.name: target for target in problem.targets}
        self.twin = problem.twin(start)
        self.statistics = reestimate(Twin(problem.model), self.twin, problem.data)
        self.latents = {n: Latent.of(matrix_of(t), start.codes[n]) for n, t in self.targets.items()}
        self.floats = {n: start.biases.get(n, p).detach() for n, p in vectors(problem).items()}
        self.units = {
            n: float(p.float().square().mean().sqrt()) or 1.0 for n, p in self.floats.items()
        }
        for name, target in self.targets.items():
            bias = bias_of(problem.model, target)
            if bias is not None:  # moves as far as outputs that inputs of unit variance give
                size = matrix_of(target).float().square().sum(1).mean().sqrt()
                self.units[name.removesuffix(target.attribute) + bias] = float(size)
        self.deltas = {n: torch.zeros_like(p, dtype=torch.float32) for n, p in self.floats.items()}

    def leaves(self, rate: float) -> Iterator[tuple[float, Tensor]]:
        """Yield what is trained, each with its rate."""
        for latent in self.latents.values():
            for of_grid, leaf in latent.leaves():
                yield rate * (_OF_GRID if of_grid else 1.0), leaf
        for delta in self.deltas.values():
            yield rate * _OF_FLOATS, delta

    def hold_(self) -> None:
        """Give the network its weights and float parameters as they stand, with their graph."""
        weights = {
            name: target.layout.unfold(self.latents[name].matrix()).to(target.weight.dtype)
            for name, target in self.targets.items()
        }
        self.twin.hold_(weights | self._floats_now())

    def limit_(self) -> None:
        for latent in self.latents.values():
            latent.limit_()

    def found(self, start: Found) -> Found:
        """Return codes and float parameters as they stand."""
        codes = {name: latent.coded() for name, latent in self.latents.items()}
        floats = {name: value.detach() for name, value in self._floats_now().items()}
        floats = {**start.biases, **floats, **self.statistics}
        return Found(codes, dict.fromkeys(codes, Distill.name), floats, start.notes)

    def _floats_now(self) -> dict[str, Tensor]:
        return {
            name: (first + self.deltas[name] * self.units[name]).to(first.dtype)
            for name, first in self.floats.items()
        }


def vectors(problem: Problem) -> dict[str, nn.Parameter]:
    """Return the one-dimensional floating parameters that stay in float, each once, by their keys.

    >>> from clipquant.quant.network.layers import select
    >>> model = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    >>> list(vectors(Problem(model, select(model).targets, {})))
    ['0.bias', '1.weight', '1.bias']
    """
    state = problem.model.state_dict(keep_vars=True)
    held = {n: p for n, p in state.items() if isinstance(p, nn.Parameter) and not is_lazy(p)}
    taken = {*tied_keys(dict(held)), *(target.name for target in problem.targets)}
    return {
        n: p
        for n, p in held.items()
        if n not in taken and p.dim() == 1 and p.numel() and p.is_floating_point()
    }


def _check(knobs: Distill) -> None:
    """Raise for a knob that cannot be."""
    for key in ("steps", "patience"):
        value = getattr(knobs, key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(f"{key} must be a whole number, 1 or more; got {value!r}.")
    for key in ("rate", "seconds"):
        value = getattr(knobs, key)
        if key == "seconds" and value is None:
            continue
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise ArgumentError(f"{key} must be a number above 0; got {value!r}.")
    if isinstance(knobs.seed, bool) or not isinstance(knobs.seed, int) or knobs.seed < 0:
        raise ArgumentError(f"seed must be a whole number, 0 or more; got {knobs.seed!r}.")
    if knobs.loss not in ("auto", "kl", "mse"):
        raise ArgumentError(f"loss must be one of 'auto', 'kl', 'mse'; got {knobs.loss!r}.")
    if not isinstance(knobs.labels, bool):
        raise ArgumentError(f"labels must be True or False; got {knobs.labels!r}.")
    if knobs.teacher is not None and not isinstance(knobs.teacher, (nn.Module, str, Path)):
        raise ArgumentError(
            "teacher must be a module, the path of a checkpoint, or None for the float network; got "
            f"{knobs.teacher!r}."
        )
