"""Quantizing without a Trainer: a model in, a `QuantizedModel` out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clipquant.artifact import load_state, read_artifact, save_artifact, serialized_size
from clipquant.budget import (
    Goal,
    check_budget,
    meet,
    missed_size,
    refuse_below,
    size_in_bytes,
    spare_bytes,
)
from clipquant.export.compressed_tensors import PackQuantized, to_pack_quantized
from clipquant.quant.auto import allocator, smallest_weights
from clipquant.quant.calibrate import Progress
from clipquant.quant.layers import Globs, Target, select
from clipquant.quant.model import (
    QuantizedWeights,
    check_finite,
    check_method,
    quantize_weights,
    specs_for,
)
from clipquant.quant.observe import Forward, calibration_data, call_model
from clipquant.quant.sensitivity import output_divergence, squared_gradients
from clipquant.quant.spec import Granularity, QuantSpec
from clipquant.report.files import environment
from clipquant.report.layers import bits_per_weight, layer_records
from clipquant.report.progress import progress_bar
from clipquant.report.record import QuantizationReport
from clipquant.report.stored import describe


@dataclass(frozen=True)
class QuantizedModel:
    """A model's quantized weights, apart from the model.

    Args:
        weights: Codes, scales and every other tensor of the model's state.
        report: What was gained and what it cost.
    """

    weights: QuantizedWeights
    report: QuantizationReport

    def state_dict(self) -> dict[str, Tensor]:
        """Return the model's state dict, the quantized weights dequantized."""
        return self.weights.state_dict()

    def apply_to(self, model: nn.Module) -> nn.Module:
        """Load the dequantized weights into `model`, which keeps its class, keys and dtypes.

        Args:
            model: A module of the same architecture.

        Returns:
            `model`.

        Raises:
            ArtifactError: If a key or a shape differs; then nothing is changed.
        """
        return load_state(model, self.state_dict(), "the quantized model")

    def save(self, path: str | Path) -> Path:
        """Write the file that `load_quantized` reads: whole or not at all.

        Args:
            path: Its name.

        Returns:
            The path.

        Raises:
            OSError: If it cannot be written.
        """
        return save_artifact(self.weights, path, describe(self.report))

    def reported(self, **known: Any) -> QuantizedModel:
        """Return the same weights with more known about them, and the size of the file that says so.

        Args:
            known: Fields of `QuantizationReport`.
        """
        report = replace(self.report, **known)
        size = serialized_size(self.weights, describe(report))
        if report.budget is not None:
            trials = (replace(t, size_bytes=size) if t.chosen else t for t in report.budget.trials)
            report = replace(report, budget=replace(report.budget, trials=tuple(trials)))
        return replace(self, report=replace(report, size_bytes=size))


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
        raise ValueError(
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


@dataclass(frozen=True)
class AutoBits:
    """What bits="auto" is asked: the budgets, the metric that judges, and what is quantized how."""

    max_drop: float | None
    max_size: int | float | str | None
    monitor: str
    mode: str
    granularity: Granularity = "channel"
    include: Globs = None
    exclude: Globs = None
    overrides: Mapping[str, int] | None = None


@dataclass(frozen=True)
class Seen:
    """What bits="auto" chooses from.

    Args:
        fisher: Name of a weight -> E[g^2], (rows, columns).
        batches: Calibration inputs.
        forward: Runs a model on a batch.
        progress: Told before each weight.
    """

    fisher: Mapping[str, Tensor]
    batches: Sequence[Any]
    forward: Forward = call_model
    progress: Progress | None = None


def quantize_auto(
    model: nn.Module,
    goal: AutoBits,
    seen: Seen,
    before: Mapping[str, float],
    judge: Callable[[QuantizedWeights], Mapping[str, float]] | None,
) -> QuantizedModel:
    """Return `model` with bits for each row that meet the budgets, or come nearest to them.

    Args:
        model: Any module; it is not touched.
        goal: What is asked.
        seen: Sensitivities and calibration data.
        before: Metrics of the float model.
        judge: Metrics of the model with some weights; None: only a size can be met.

    Raises:
        ValueError: For what cannot be asked of this model; see `clipquant.budget.meet`.
    """
    selection = select(model, goal.include, goal.exclude)
    check_finite(selection.targets)
    fixed = _given_widths(selection.targets, goal.overrides)
    found = allocator(
        model, selection, seen.fisher, seen.batches, forward=seen.forward, group_size=_group_size(goal),
        fixed=fixed, progress=seen.progress,
    )  # fmt: skip
    base = replace(
        make_report(found.weights(found.uniform(8)), model),
        float_metrics=dict(before),
        monitor=goal.monitor,
        mode=goal.mode,
    )
    most = None if goal.max_size is None else size_in_bytes(goal.max_size, base.float_bytes)
    spare = spare_bytes(len(seen.fisher), before)

    def size_of(weights: QuantizedWeights) -> int:
        return serialized_size(weights, describe(base))

    asked = Goal(goal.max_drop, most, goal.monitor, goal.mode)
    outcome = meet(asked, found, size_of, before, judge, spare)
    report = make_report(outcome.weights, model, found.sensitivities(outcome.bits))
    made = QuantizedModel(outcome.weights, report).reported(
        float_metrics=dict(before),
        quantized_metrics=dict(outcome.metrics),
        monitor=goal.monitor if before else None,
        mode=goal.mode if before else None,
        budget=outcome.budget,
    )
    failure = outcome.budget.failure or missed_size(asked, made.report.size_bytes)
    return made.reported(budget=replace(outcome.budget, failure=failure))


def check_smallest(model: nn.Module, goal: AutoBits) -> None:
    """Raise for a size budget below what the model's shapes alone take, before anything is computed.

    Args:
        model: Any module, trained or not.
        goal: What is asked.

    Raises:
        BudgetError: Naming the smallest possible file.
    """
    selection = select(model, goal.include, goal.exclude)
    fixed = _given_widths(selection.targets, goal.overrides)
    if goal.max_size is None:
        return
    weights = smallest_weights(model, selection, group_size=_group_size(goal), fixed=fixed)
    report = make_report(weights, model)
    smallest = report.size_bytes + spare_bytes(len(selection.targets), {})
    refuse_below(size_in_bytes(goal.max_size, report.float_bytes), smallest)


def _group_size(goal: AutoBits) -> int | None:
    return goal.granularity if isinstance(goal.granularity, int) else None


def check_auto(
    max_drop: object,
    max_size: object,
    method: str,
    levels: object,
    symmetric: object,
    granularity: object,
) -> None:
    """Raise for arguments that bits="auto" cannot obey, naming each with its remedy."""
    if max_drop is None and max_size is None:
        raise ValueError("bits='auto' needs max_drop or max_size to choose by; got neither.")
    check_budget(max_drop, max_size)
    wrong = {
        "method": (method, method not in ("auto", "gptq")),
        "levels": (levels, levels is not None),
        "symmetric": (symmetric, bool(symmetric)),
        "granularity": (granularity, granularity == "tensor"),
    }
    for name, (value, bad) in wrong.items():
        if bad:
            raise ValueError(
                f"bits='auto' gives each output channel a grid of its own, affine, its codes chosen by 'gptq'; got "
                f"{name}={value!r}. Leave {name} out, or give bits as a number."
            )


def _given_widths(targets: Iterable[Target], overrides: Mapping[str, int] | None) -> dict[str, int]:
    specs = specs_for(targets, QuantSpec(8), overrides)
    return {
        name: spec.bits
        for name, spec in specs.items()
        if any(fnmatchcase(name, pattern) for pattern in overrides or {})
    }


def _auto_data(data: Iterable[Any] | None, count: int) -> list[Any]:
    if data is None or count == 0:
        raise ValueError(
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


def make_report(
    weights: QuantizedWeights, model: nn.Module, sensitivities: Mapping[str, float] | None = None
) -> QuantizationReport:
    """Return the report of quantized weights beside the float model they came from."""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    unique = {k: v for k, v in state.items() if k not in weights.aliases}
    report = QuantizationReport(
        layers=layer_records(weights, state, sensitivities),
        left=weights.left,
        float_bytes=sum(v.nbytes for v in unique.values()),
        size_bytes=1,
        bits_per_weight=bits_per_weight(weights.tensors.values()),
        environment=environment(),
    )
    return replace(report, size_bytes=serialized_size(weights, describe(report)))


def to_compressed_tensors(path: str | Path, out: str | Path) -> PackQuantized:
    """Write an artifact's Linear layers in the layout that the compressed-tensors package reads.

    Codes and scales are kept. What the layout cannot hold, such as convolutions, is written
    dequantized, and a warning names it.

    Args:
        path: A file written by `QuantizedModel.save` or `QuantizeOnFitEnd`.
        out: Folder for `model.safetensors` and `config.json`.

    Returns:
        What was packed, and what was not and why.

    Raises:
        ArtifactError: If the file is missing, damaged or of a newer format.
        ExportError: If no weight fits the layout.
        OSError: If the folder cannot be written.
    """
    written = to_pack_quantized(read_artifact(path).weights, out)
    if written.dense:
        said = ", ".join(f"{name} ({why})" for name, why in written.dense.items())
        warnings.warn(f"{out}: written dequantized: {said}.", stacklevel=2)
    return written
