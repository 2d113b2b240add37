"""Quantizing without a Trainer: a model in, a `QuantizedModel` out."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipquant.artifact import load_state, read_artifact, save_artifact, serialize
from clipquant.export.compressed_tensors import PackQuantized, to_pack_quantized
from clipquant.quant.calibrate import Progress
from clipquant.quant.layers import Globs
from clipquant.quant.model import QuantizedWeights, quantize_weights
from clipquant.quant.observe import Forward, calibration_data, call_model
from clipquant.quant.spec import Granularity
from clipquant.report.files import environment
from clipquant.report.layers import bits_per_weight, layer_records
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
        size = len(serialize(self.weights, describe(report)))
        return replace(self, report=replace(report, size_bytes=size))


def quantize(
    model: nn.Module,
    bits: int = 8,
    *,
    levels: int | None = None,
    symmetric: bool | None = None,
    granularity: Granularity = "channel",
    method: str = "auto",
    include: Globs = None,
    exclude: Globs = None,
    overrides: Mapping[str, int] | None = None,
    data: Iterable[Any] | None = None,
    calibration_batches: int = 16,
    forward: Forward = call_model,
    progress: Progress | None = None,
    score: Callable[[nn.Module], float] | None = None,
) -> QuantizedModel:
    """Return `model` quantized; `model` itself is never touched.

    Args:
        model: Any module.
        bits: Width of a code, 1 to 8.
        levels: Steps of the grid, instead of the most that `bits` allow.
        symmetric: Whether the grid has an exact zero in its middle. None: what suits the width.
        granularity: What shares a scale: "tensor", "channel" or that many weights of a channel.
        method: "rtn", round to nearest on the min-max grid; "mse" and "hqq", on a better range;
            "gptq" and "adaround", codes that keep the layers' outputs on `data`; "auto", the best of
            them for the width and the data.
        include: Globs over state-dict keys; None: every known weight.
        exclude: Globs over state-dict keys that stay in float.
        overrides: Glob over state-dict keys -> bits for those weights.
        data: Calibration inputs, without need of labels: an iterable of tensors, of tuples (positional
            arguments; those beyond what `forward` takes are left out) or of dicts (keywords).
        calibration_batches: How many batches of `data` to use; 0: data-free.
        forward: Runs a copy of the model on a batch, where calling it is not enough.
        progress: Told the weight's name, the steps done and the steps in all, before each step.
        score: Returns a figure of merit of a model.

    Returns:
        The quantized model, with its report.

    Raises:
        ValueError: For an argument that cannot be; the message names the rule and the remedy.

    >>> quantized = quantize(nn.Linear(64, 64), bits=4)
    >>> quantized.report.layers[0].bits
    4.0
    """
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
        progress=progress,
    )
    quantized = QuantizedModel(weights, make_report(weights, model))
    if score is None:
        return quantized
    before = {"score": float(score(model))}
    after = {"score": float(score(quantized.apply_to(copy.deepcopy(model))))}
    return quantized.reported(
        float_metrics=before, quantized_metrics=after, monitor="score", mode="max"
    )


def make_report(weights: QuantizedWeights, model: nn.Module) -> QuantizationReport:
    """Return the report of quantized weights beside the float model they came from."""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    unique = {k: v for k, v in state.items() if k not in weights.aliases}
    report = QuantizationReport(
        layers=layer_records(weights, state),
        left=weights.left,
        float_bytes=sum(v.nbytes for v in unique.values()),
        size_bytes=1,
        bits_per_weight=bits_per_weight(weights.tensors.values()),
        environment=environment(),
    )
    return replace(report, size_bytes=len(serialize(weights, describe(report))))


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
