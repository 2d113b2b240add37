"""What one export came to: its file, what it cost, what its reader should know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Timing:
    """Median milliseconds of one call of a file and of the float model in the same runtime, in turn.

    Args:
        batch: Rows a call.
        float_ms: Of the float model.
        own_ms: Of the file.
        threads: Threads of one operator.
        what: What the file computes in, as "int8".
    """

    batch: int
    float_ms: float
    own_ms: float
    threads: int
    what: str = "int8"

    @property
    def ratio(self) -> float:
        """The file's time over the float model's."""
        return self.own_ms / self.float_ms


@dataclass(frozen=True)
class ExportRecord:
    """One exported file, or why there is none.

    Args:
        format: Name of the format.
        path: The file; None where it could not be made.
        bytes: Its size.
        difference: Largest absolute difference between its outputs and the quantized model's on
            the example input, in the units of the outputs.
        notes: What the reader should know, such as codes stored wider than they are.
        metrics: The validation metrics measured on the file itself.
        timings: Its latency beside the float model's, by batch size.
        error: Why there is no file.
    """

    format: str
    path: str | None = None
    bytes: int = 0
    difference: float | None = None
    notes: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    timings: tuple[Timing, ...] = ()
    error: str | None = None

    @property
    def latency(self) -> dict[str, float]:
        """The timings as figures under names that say what they are, as "batch 1, ratio".

        >>> ExportRecord("onnx-int8", timings=(Timing(1, 0.8, 0.4, 2),)).latency
        {'threads': 2.0, 'batch 1, float, ms': 0.8, 'batch 1, int8, ms': 0.4, 'batch 1, ratio': 0.5}
        """
        figures: dict[str, float] = {}
        for timing in self.timings:
            figures["threads"] = float(timing.threads)
            figures[f"batch {timing.batch}, float, ms"] = timing.float_ms
            figures[f"batch {timing.batch}, {timing.what}, ms"] = timing.own_ms
            figures[f"batch {timing.batch}, ratio"] = timing.ratio
        return figures

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values.

        >>> ExportRecord("pt2", error="no graph").to_dict()["error"]
        'no graph'
        """
        return {**asdict(self), "latency": self.latency}
