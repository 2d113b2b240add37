"""Quantizing without a Trainer: a model in, a `QuantizedModel` out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipquant.artifact import load_state
from clipquant.budget.chance import Judged, drop_between
from clipquant.errors import ArgumentError
from clipquant.keywords import OF_QUANTIZING, naming_keywords
from clipquant.model.asked import as_batches, check_model, check_spelling, with_teacher
from clipquant.model.auto import AutoBits, Seen, check_auto, check_budgets, quantize_auto
from clipquant.model.quantized import QuantizedModel, make_report
from clipquant.model.score import NAME, Score, judged_by
from clipquant.quant.codes.coding import Coding, check_coding
from clipquant.quant.codes.spec import MAX_BITS, Granularity
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.methods import Method
from clipquant.quant.network.bare import on_bare
from clipquant.quant.network.calibration import (
    Calibration,
    Forward,
    Progress,
    calibration_data,
    call_model,
    plain_loop,
)
from clipquant.quant.network.devices import asked_device, device_of, loop_on_device, moved
from clipquant.quant.network.layers import Globs
from clipquant.quant.network.twin import twin_of
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.quant.widths.sensitivity import believed_gradients, output_divergence
from clipquant.report.progress import progress_bar
from clipquant.report.worries import boundless


@naming_keywords(OF_QUANTIZING)
@torch.inference_mode(False)
@on_bare
def quantize(
    model: nn.Module,
    bits: int | Literal["auto"] = 8,
    *,
    levels: int | None = None,
    symmetric: bool | None = None,
    granularity: Granularity | None = None,
    method: str | Method = "auto",
    include: Globs = None,
    exclude: Globs = None,
    overrides: Mapping[str, int] | None = None,
    max_drop: float | None = None,
    max_size: int | float | str | None = None,  # noqa: PYI041 - an int is bytes, a float a share
    data: Iterable[Any] | None = None,
    calibration_batches: int = 16,
    forward: Forward = call_model,
    progress: Progress | bool = True,
    score: Score | None = None,
    confidence: float | None = None,
    coding: Coding = "dense",
    device: torch.device | str | int | None = None,
) -> QuantizedModel:
    """Return `model` quantized; `model` itself is never touched.

    Args:
        model: Any module.
        bits: Width of a code, 1 to 8; "auto": 0 to 8 for each output channel, as the budgets ask. A number is
            the same for all channels: in the same bytes bits by channel are nearer to the float network where
            channels have many weights, farther where they have few, and take two to six times as long
            (benchmarks/README.md); "auto" with `max_size` gives them.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel. None: a
            channel where that holds, else groups of 128, 64 or 32 weights, whichever pay for their scales.
        method: "rtn", round to nearest on the min-max grid; "mse" and "hqq", on a better range;
            "gptq", codes that keep the layers' outputs on `data`; "adaround", codes learned until the
            network's outputs are kept; "distill", codes, grids and biases trained on its outputs for 2 bits
            and less; "auto", the best of the quick ones for the width and the data; or an object with
            `name`, `needs_data` and `solve`, see `clipquant.quant.methods.Method`.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights.
        max_drop: With bits="auto": most that the score may lose.
        max_size: With bits="auto": most bytes of the file: a whole number, a fraction of the float size, or a text
            such as "300kB", "300 kb", "2k", "1.5 MB" (powers of 1000) or "10KiB" (of 1024).
        data: Calibration inputs, without need of labels: an iterable of tensors, of tuples (positional
            arguments; those beyond what `forward` takes are left out) or of dicts (keywords). A single tensor
            or dict is one batch.
        calibration_batches: How many batches of `data` to use; 0: data-free.
        forward: Runs a copy of the model on a batch, where calling it is not enough.
        progress: Whether a bar shows the weight at work and the time left of what takes longer than 2 s;
            or what is told the weight's name, the steps done and the steps in all, before each step.
        score: Returns a figure of merit of a model, higher is better; or a tensor of such figures, one for each
            sample, of which the mean counts. Samples have chance: with a figure for each, the drop has a standard
            error, and `max_drop` is kept with it. A single figure is taken as it is.
        confidence: With `max_drop`: how sure it must be, above 0.5 and below 1, that the true drop is within it.
            None: the drop measured and one standard error must be.
        coding: How a file holds codes: "dense"; "entropy", each weight in an entropy code where that is smaller,
            which needs the extra `clipquant[entropy]` to write and to read; or "auto", "entropy" where that extra
            is installed and saves 5 % of the file or more. With bits="auto", `max_size` counts what is coded.
        device: Where a copy of the model runs and its codes are computed, such as "cuda"; a layer that finds no
            memory there is computed on the CPU, and the report says so. The result lies where the model does.
            None: there.

    Returns:
        The quantized model, with its report.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    >>> quantized = quantize(nn.Linear(64, 64), bits=4)
    >>> quantized.report.layers[0].bits
    4.0
    """
    check_model(model)
    check_spelling(method)
    check_coding(coding)
    data, on = as_batches(data), asked_device(device)
    chosen = MAX_BITS if bits == "auto" else bits
    recipe = Recipe(chosen, levels, symmetric, granularity, method, include, exclude, overrides)
    if bits == "auto":
        check_auto(max_drop, max_size, recipe, confidence)
        if on is not None:
            raise ArgumentError(
                f"bits='auto' computes where the model lies; got device={device!r}. Move the model there, and leave "
                "device out."
            )
        batches = _auto_data(data, calibration_batches)
        goal = AutoBits(max_drop, max_size, NAME, "max", recipe, confidence, coding)
        judge = None if score is None else _judge_of(model, score)
        before = Judged({}) if score is None else judged_by(score, model)
        with progress_bar(progress) as tell:
            calibration = Calibration(batches, forward, tell)
            made = quantize_auto(
                twin_of(model), goal, _seen(model, recipe, calibration), before, judge
            )
        return _warned(made.reported(calibration=f"{len(batches)} batches of the data given"))
    check_budgets(bits, max_drop, max_size, confidence)
    batches = [] if data is None else calibration_data(data, calibration_batches)
    with progress_bar(progress) as tell:
        guest = model if on is None and not batches else twin_of(model)
        loop = plain_loop if on is None else loop_on_device(on)
        guest = guest if on is None else guest.to(on)
        made = quantize_by(recipe, guest, Calibration(batches, forward, tell, on, loop))
    if on is not None:
        made = replace(made, weights=moved(made.weights, device_of(model)))
    made = made if coding == "dense" else made.coded(coding)
    _warned(made)
    if score is None:
        return made
    before, after = judged_by(score, model), judged_by(score, made.apply_to(copy.deepcopy(model)))
    return made.reported(
        float_metrics=before.metrics,
        quantized_metrics=after.metrics,
        drop_error=drop_between(before, after, NAME, "max").shown_error,
        monitor=NAME,
        mode="max",
    )


def quantize_by(
    recipe: Recipe, model: nn.Module, calibration: Calibration | None = None
) -> QuantizedModel:
    """Return a model quantized as a recipe says.

    Args:
        recipe: The settings.
        model: In eval mode where there is a calibration: it is run, with other weights in their places,
            and ends as it was.
        calibration: Batches, and how to run them.
    """
    weights = quantize_weights(model, with_teacher(recipe, model), calibration)
    return QuantizedModel(weights, make_report(weights, model))


def _warned(made: QuantizedModel) -> QuantizedModel:
    """Return the same, after a warning where the network is likely harmed and where a budget bounds nothing."""
    harmed = f"The quantized network is {made.report.warning}" if made.report.warning else ""
    for said in filter(None, (harmed, boundless(made.report))):
        warnings.warn(f"{said}.", stacklevel=6)
    return made


def _auto_data(data: Iterable[Any] | None, count: int) -> list[Any]:
    if data is None or count == 0:
        raise ArgumentError(
            "bits='auto' estimates from data how much each row matters; got "
            f"data={'None' if data is None else '...'}, calibration_batches={count}. Pass an iterable of inputs, and "
            "1 or more."
        )
    return calibration_data(data, count)


def _seen(model: nn.Module, recipe: Recipe, calibration: Calibration) -> Seen:
    """Return the calibration with the sensitivities of a copy's outputs, which backward passes run through."""
    guest = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)

    def loss(guest: nn.Module, batch: Any) -> tuple[Tensor, int]:
        return output_divergence(calibration.forward(guest, batch), generator)

    fisher = believed_gradients(guest, recipe.select(guest).targets, calibration, loss)
    return Seen(fisher, calibration)


def _judge_of(model: nn.Module, score: Score) -> Callable[[QuantizedWeights], Judged]:
    guest = copy.deepcopy(model)

    def judge(weights: QuantizedWeights) -> Judged:
        return judged_by(score, load_state(guest, weights.state_dict(), "the quantized model"))

    return judge
