"""Quantizing without a Trainer: a model in, a `QuantizedModel` out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipquant.artifact import load_state
from clipquant.errors import ArgumentError
from clipquant.model.auto import AutoBits, Seen, check_auto, quantize_auto
from clipquant.model.quantized import QuantizedModel, make_report
from clipquant.quant.codes.spec import Granularity
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.network.calibration import Forward, Progress, calibration_data, call_model
from clipquant.quant.network.layers import Globs, select
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import check_method
from clipquant.quant.widths.sensitivity import output_divergence, squared_gradients
from clipquant.report.progress import progress_bar


def quantize(
    model: nn.Module,
    bits: int | Literal["auto"] = 8,
    *,
    levels: int | None = None,
    symmetric: bool | None = None,
    granularity: Granularity = "channel",
    method: str = "auto",
    include: Globs = None,
    exclude: Globs = None,
    overrides: Mapping[str, int] | None = None,
    max_drop: float | None = None,
    max_size: int | float | str | None = None,  # noqa: PYI041 - an int is bytes, a float a share
    data: Iterable[Any] | None = None,
    calibration_batches: int = 16,
    forward: Forward = call_model,
    progress: Progress | bool = True,
    score: Callable[[nn.Module], float] | None = None,
) -> QuantizedModel:
    """Return `model` quantized; `model` itself is never touched.

    Args:
        model: Any module.
        bits: Width of a code, 1 to 8; "auto": 0 to 8 for each output channel, as the budgets ask.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel.
        method: "rtn", round to nearest on the min-max grid; "mse" and "hqq", on a better range;
            "gptq", codes that keep the layers' outputs on `data`; "adaround", codes learned until the
            network's outputs are kept; "auto", the best of the quick ones for the width and the data.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights.
        max_drop: With bits="auto": most that the score may lose.
        max_size: With bits="auto": most bytes of the file: a number, a fraction of the float size, or
            "300kB".
        data: Calibration inputs, without need of labels: an iterable of tensors, of tuples (positional
            arguments; those beyond what `forward` takes are left out) or of dicts (keywords).
        calibration_batches: How many batches of `data` to use; 0: data-free.
        forward: Runs a copy of the model on a batch, where calling it is not enough.
        progress: Whether a bar shows the weight at work and the time left of what takes longer than 2 s;
            or what is told the weight's name, the steps done and the steps in all, before each step.
        score: Returns a figure of merit of a model, higher is better.

    Returns:
        The quantized model, with its report.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    >>> quantized = quantize(nn.Linear(64, 64), bits=4)
    >>> quantized.report.layers[0].bits
    4.0
    """
    check_method(method)
    if bits == "auto":
        check_auto(max_drop, max_size, method, levels, symmetric, granularity)
        batches = _auto_data(data, calibration_batches)
        guest = copy.deepcopy(model).eval()
        targets = select(guest, include, exclude).targets
        fisher = squared_gradients(guest, targets, batches, _divergence(forward))
        goal = AutoBits(
            max_drop, max_size, "score", "max", granularity, include, exclude, overrides
        )
        judged = None if score is None else _judge_of(model, score)
        before = {} if score is None else {"score": float(score(model))}
        with progress_bar(progress) as tell:
            found = quantize_auto(model, goal, Seen(fisher, batches, forward, tell), before, judged)
        return found.reported(calibration=f"{len(batches)} batches of the data given")
    if max_drop is not None or max_size is not None:
        raise ArgumentError(
            f"max_drop and max_size need bits='auto', which chooses the bits by them; got bits={bits!r}."
        )
    with progress_bar(progress) as tell:
        weights = quantize_weights(
            model,
            bits,
            levels=levels,
            symmetric=symmetric,
            granularity=granularity,
            include=include,
            exclude=exclude,
            overrides=overrides,
            method=method,
            batches=None if data is None else calibration_data(data, calibration_batches),
            forward=forward,
            progress=tell,
        )
    quantized = QuantizedModel(weights, make_report(weights, model))
    if score is None:
        return quantized
    before = {"score": float(score(model))}
    after = {"score": float(score(quantized.apply_to(copy.deepcopy(model))))}
    return quantized.reported(
        float_metrics=before, quantized_metrics=after, monitor="score", mode="max"
    )


def _auto_data(data: Iterable[Any] | None, count: int) -> list[Any]:
    if data is None or count == 0:
        raise ArgumentError(
            "bits='auto' estimates from data how much each row matters; got "
            f"data={'None' if data is None else '...'}, calibration_batches={count}. Pass an iterable of inputs, and "
            "1 or more."
        )
    return calibration_data(data, count)


def _divergence(forward: Forward) -> Callable[[nn.Module, Any], tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return lambda model, batch: output_divergence(forward(model, batch), generator)


def _judge_of(
    model: nn.Module, score: Callable[[nn.Module], float]
) -> Callable[[QuantizedWeights], Mapping[str, float]]:
    guest = copy.deepcopy(model)

    def judge(weights: QuantizedWeights) -> Mapping[str, float]:
        return {
            "score": float(score(load_state(guest, weights.state_dict(), "the quantized model")))
        }

    return judge
