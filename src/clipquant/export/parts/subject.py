"""What is exported, and by what a format may choose."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import nn

from clipquant.export.example import Example, ExportError
from clipquant.quant.codes.weights import QuantizedWeights

Forward: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Judgement:
    """What a file is worth.

    Args:
        drop: How much worse than the float model, in the units of the metric that judges.
        metrics: Every metric that was measured.
    """

    drop: float
    metrics: Mapping[str, float]


Judge: TypeAlias = Callable[[Forward], Judgement]


@dataclass(frozen=True)
class Subject:
    """Quantized weights, the model that they belong to, and what is known of its use.

    Args:
        weights: Quantized weights.
        model: A module of the architecture that was quantized; not touched. None: unknown.
        example: A call that it accepts. None: unknown.
        calibration: Calls whose activations set the ranges of a format that has such.
        judge: What a forward, run by the file, is worth. None: no metric is known.
        max_drop: Most that the file may lose by the judge. None: no limit.
        ranges: Name of a weight -> the ends of what its layer is called with, where training has learned them.
    """

    weights: QuantizedWeights
    model: nn.Module | None = None
    example: Example | None = None
    calibration: Sequence[Example] = ()
    judge: Judge | None = None
    max_drop: float | None = None
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def call(self) -> tuple[nn.Module, Example]:
        """Return the model and a call of it.

        Raises:
            ExportError: If one of them is not known.
        """
        if self.model is None or self.example is None:
            raise ExportError(
                "this format is traced from the model, of which "
                f"{'nothing' if self.model is None else 'no example input'} is known: give both."
            )
        return self.model, self.example
