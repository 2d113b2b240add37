"""A model's quantized weights apart from the model, and their report."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from clipquant.artifact import load_state, save_artifact, serialized_size
from clipquant.quant.codes.coding import Coding, with_coding
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.report.files import environment
from clipquant.report.layers import bits_per_weight, coded_figures, layer_records
from clipquant.report.record import LayerRecord, QuantizationReport
from clipquant.report.stored import describe
from clipquant.shown import shown


@dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A model's quantized weights, apart from the model.

    Args:
        weights: Codes, scales and every other tensor of the model's state.
        report: What was gained and what it cost.
    """

    weights: QuantizedWeights
    report: QuantizationReport

    def __repr__(self) -> str:
        return f"QuantizedModel: .save(path), .apply_to(model), .state_dict()\n{self.report!r}"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()

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

    def coded(self, coding: Coding) -> QuantizedModel:
        """Return the same weights with codes that a file holds dense or in an entropy code, and their report.

        Args:
            coding: "dense", "entropy" or "auto", see `quantize`.

        Raises:
            ValueError: For anything else.
            MissingPackageError: For "entropy" without the extra `clipquant[entropy]`.
        """
        weights = with_coding(self.weights, coding)
        layers = tuple(
            replace(layer, **coded_figures(weights.tensors[layer.name]))
            for layer in self.report.layers
        )
        share = bits_per_weight(weights.tensors.values())
        return replace(self, weights=weights).reported(layers=layers, bits_per_weight=share)

    def save(self, path: str | Path, *, coding: Coding | None = None) -> Path:
        """Write the file that `load_quantized` reads: whole or not at all.

        Args:
            path: Its name.
            coding: How it holds codes, see `quantize`. None: as the model was quantized.

        Returns:
            The path.

        Raises:
            OSError: If it cannot be written.
            MissingPackageError: For coding="entropy" without the extra `clipquant[entropy]`.

        Warns:
            UserWarning: If it is larger than the float tensors, with the reason.
        """
        if coding is not None:
            return self.coded(coding).save(path)
        written = save_artifact(self.weights, path, describe(self.report))
        size, floats = written.stat().st_size, self.report.float_bytes
        if size > floats:
            codes = sum(layer.bytes for layer in self.report.layers)
            warnings.warn(
                f"{shown(written)} has {size:,} bytes, more than the {floats:,} of the float tensors: codes and "
                f"scales take {codes:,} of them, names, shapes and what is said of them outweigh the rest of so small "
                "a model. Keep the float weights, or quantize a larger one.",
                stacklevel=2,
            )
        return written

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


def make_report(
    weights: QuantizedWeights, model: nn.Module, sensitivities: Mapping[str, float] | None = None
) -> QuantizationReport:
    """Return the report of quantized weights beside the float model they came from."""
    state = {k: v for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    float_bytes = sum(v.nbytes for k, v in state.items() if k not in weights.aliases)
    return report_of(weights, layer_records(weights, state, sensitivities), float_bytes)


def report_of(
    weights: QuantizedWeights, layers: tuple[LayerRecord, ...], float_bytes: int
) -> QuantizationReport:
    """Return the report of quantized weights, given what cannot be seen of them: what is lost, layer by layer."""
    report = QuantizationReport(
        layers=layers,
        left=weights.left,
        float_bytes=float_bytes,
        size_bytes=1,
        bits_per_weight=bits_per_weight(weights.tensors.values()),
        environment=environment(),
    )
    return replace(report, size_bytes=serialized_size(weights, describe(report)))
