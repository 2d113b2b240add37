"""All that a reporter may see: one frozen record of what was gained and what it cost."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from clipquant.quant.codes.weights import LeftInFloat
from clipquant.report.digits import change_said, sure_said
from clipquant.report.worries import suspicion, worries

HARMED = "likely harmed"  # begins the note of a weight whose figures say so


@dataclass(frozen=True)
class Histogram:
    """How a float weight's values lie, and the grid of its most typical row.

    Args:
        low: Smallest weight.
        high: Largest weight.
        counts: Weights in each of equally wide bins from `low` to `high`, relative to the fullest
            bin, which is 63.
        levels: Values of the grid of the row of median scale among those of the commonest width.
        row: Which row that is.
    """

    low: float
    high: float
    counts: tuple[int, ...]
    levels: tuple[float, ...] = ()
    row: int = 0


@dataclass(frozen=True)
class LayerRecord:
    """One quantized weight.

    Args:
        name: Its key in the state dict.
        shape: Its shape.
        bits: Width of its codes; the mean where rows differ.
        method: What chose the codes.
        sqnr_db: Signal to quantization noise, 10 log10(sum w^2 / sum (w - w_q)^2), in dB;
            infinite where nothing was lost.
        bytes: Of its codes, scales and zeros in the file.
        note: What the reader should know, such as a fallback.
        sensitivity: Expected increase of the loss by its rounding, where it was estimated.
        rows: Width of a code -> output channels that have it.
        histogram: Of the float weights.
        coded_bits: What a code takes in the file's entropy code, on average; None: codes are dense.
        entropy: Of its codes, bits a code, where they are in an entropy code and were looked at.
    """

    name: str
    shape: tuple[int, ...]
    bits: float
    method: str
    sqnr_db: float
    bytes: int
    note: str = ""
    sensitivity: float | None = None
    rows: Mapping[int, int] = field(default_factory=dict)
    histogram: Histogram | None = None
    coded_bits: float | None = None
    entropy: float | None = None


@dataclass(frozen=True)
class Trial:
    """One allocation of bits that a search for a budget has judged.

    Args:
        size_bytes: Bytes of its file.
        value: The monitored metric, where it was measured.
        what: How its bits were given: "rows" or "uniform".
        chosen: Whether it is the one in the file.
        error: Standard error of its drop, where one is known.
    """

    size_bytes: int
    value: float | None = None
    what: str = "rows"
    chosen: bool = False
    error: float | None = None


@dataclass(frozen=True)
class Budget:
    """What was asked of the file, and the search that answered.

    Args:
        max_drop: Most that the monitored metric may lose, in its own units.
        max_size: Most bytes of the file.
        trials: Every allocation judged, in order.
        failure: Why a budget was missed; empty where all are met.
        confidence: How sure it had to be that the true drop is within `max_drop`; None: one standard error.
        sure: How sure it is, between 0 and 1, as far as the validation data show; None: not known.
        unsure: Why that is not known; empty where it is.
    """

    max_drop: float | None = None
    max_size: int | None = None
    trials: tuple[Trial, ...] = ()
    failure: str = ""
    confidence: float | None = None
    sure: float | None = None
    unsure: str = ""

    @property
    def met(self) -> bool:
        return not self.failure


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of a step before and after quantizing, measured on this machine.

    Args:
        float_ms: Of the float model.
        quantized_ms: Of the model holding the dequantized weights.
        batch: Samples a step.
        threads: Threads that torch used.
        what: What was timed.
    """

    float_ms: float
    quantized_ms: float
    batch: int
    threads: int
    what: str = "forward"


@dataclass(frozen=True, repr=False)
class QuantizationReport:
    """What was quantized, what it gained and what it cost.

    Args:
        layers: Every quantized weight.
        left: Every floating tensor that stayed as it was, and why.
        float_bytes: Bytes of all tensors of the float model, tied ones once.
        size_bytes: Bytes of the file.
        bits_per_weight: Bits of codes, scales and zeros over the number of quantized weights.
        float_metrics: Validation metrics of the float model.
        quantized_metrics: The same metrics of the quantized model, on the same batches.
        drop_error: Standard error of the monitored metric's drop, from its differences on disjoint parts of those
            batches; None: not known.
        monitor: The metric that judges, where there is one.
        mode: Whether that metric is better when smaller ("min") or larger ("max").
        mode_from: Where that is known from, in words, where it was not asked.
        path: The file, once written.
        budget: What was asked and found, with bits="auto".
        environment: Versions and machine: name -> value.
        seed: The run's seed, where one was set.
        sha256: Of the file, as it stands in its metadata.
        calibration: Which data the quantizer saw, in words.
        latency: Before and after, where it was measured.
        exports: What each further file came to: format, path, bytes, difference, notes, metrics,
            timings, error, and latency, which is the timings under names of their own.
        failures: What could not be done when the fit ended, what was done instead, and the remedy.
    """

    layers: tuple[LayerRecord, ...]
    left: tuple[LeftInFloat, ...]
    float_bytes: int
    size_bytes: int
    bits_per_weight: float
    float_metrics: Mapping[str, float] = field(default_factory=dict)
    quantized_metrics: Mapping[str, float] = field(default_factory=dict)
    drop_error: float | None = None
    monitor: str | None = None
    mode: str | None = None
    mode_from: str = ""
    path: str | None = None
    budget: Budget | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    sha256: str | None = None
    calibration: str = ""
    latency: Latency | None = None
    exports: tuple[Mapping[str, Any], ...] = ()
    failures: tuple[str, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the float model."""
        return self.float_bytes / self.size_bytes

    @property
    def drop(self) -> float | None:
        """How much worse the monitored metric got, in its own units; below 0: it got better."""
        before = self.float_metrics.get(self.monitor or "")
        after = self.quantized_metrics.get(self.monitor or "")
        return None if before is None or after is None else drop_of(before, after, self.mode)

    @property
    def metric_names(self) -> tuple[str, ...]:
        """Names of the metrics, the one that judges first and the others by name."""
        known = {*self.float_metrics, *self.quantized_metrics}
        return tuple(sorted(known, key=lambda name: (name != self.monitor, name)))

    @property
    def harmed(self) -> tuple[str, ...]:
        """Names of the weights whose rounding likely harms the network, whatever a metric says."""
        return tuple(layer.name for layer in self.layers if layer.note.startswith(HARMED))

    @property
    def warning(self) -> str:
        """Which weights are likely harmed, and the remedy; empty where none is."""
        if not self.harmed:
            return ""
        named = ", ".join(self.harmed[:3])
        more = f" and {len(self.harmed) - 3} more" if len(self.harmed) > 3 else ""
        remedy = (
            "use 6 bits or groups (granularity=64)" if self.budget is None else "allow more bytes"
        )
        return f"{HARMED}: {named}{more}; {remedy}"

    @property
    def suspicion(self) -> str:
        """Why a metric that got better is not believed; empty where it is."""
        return suspicion(self)

    @property
    def worries(self) -> tuple[str, ...]:
        """What is to be looked at before the file is used, in words."""
        return worries(self)

    @property
    def verdict(self) -> str:
        """Whether the budgets are met, or without any what was gained, in one line."""
        size = f"{self.size_bytes:,} bytes, {ratio_said(self.ratio)}"
        if self.drop is not None:
            size += f"; {self.monitor} {change_said(self.drop, self.drop_error)}"
        size += f"; {self.warning}" if self.warning else ""
        if self.budget is None:
            return f"Not believed: {self.suspicion} ({size})" if self.suspicion else size
        if self.budget.failure:
            return f"Budget missed: {self.budget.failure} ({size})"
        if self.suspicion:
            return f"Budget not proven: {self.suspicion} ({size})"
        limits = []
        if self.budget.max_drop is not None:
            sure = self.budget.sure
            said = f" ({sure_said(sure)})" if sure is not None else ""
            limits.append(f"drop at most {self.budget.max_drop:g}{said}")
        if self.budget.max_size is not None:
            limits.append(f"at most {self.budget.max_size:,} bytes")
        return f"Budget met: {' and '.join(limits)} ({size})"

    def figures(self) -> dict[str, float]:
        """Return the figures that a logger keeps, each under `quantized/...`."""
        own: dict[str, float] = {
            "size_bytes": self.size_bytes,
            "ratio": self.ratio,
            "bits_per_weight": self.bits_per_weight,
        }
        if self.drop is not None:
            own["drop"] = self.drop
        if self.drop_error is not None:
            own["drop_error"] = self.drop_error
        if self.budget is not None:
            own["budget_met"] = float(self.budget.met and not self.suspicion)
        return {f"quantized/{k}": float(v) for k, v in {**self.quantized_metrics, **own}.items()}

    def __repr__(self) -> str:
        from clipquant.report.summary import lines  # it reads this record

        return "\n".join(lines(self))

    def _repr_html_(self) -> str:
        from clipquant.report.summary import html_table

        return html_table(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON-able values, infinities and NaN as null."""
        computed = {
            "ratio": self.ratio, "drop": self.drop, "verdict": self.verdict, "harmed": self.harmed,
        }  # fmt: skip
        return {**jsonable(asdict(self)), **jsonable(computed)}


def ratio_said(ratio: float) -> str:
    """Return how a file compares with its float model.

    >>> ratio_said(4.0), ratio_said(0.5)
    ('4.00 times smaller', '2.00 times larger')
    """
    return f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"


def drop_of(before: float, after: float, mode: str | None) -> float:
    """Return how much worse a metric got: before - after for mode "max", after - before for "min".

    >>> drop_of(0.9, 0.8, "max") > 0, drop_of(0.2, 0.1, "min") > 0
    (True, False)
    """
    return before - after if mode == "max" else after - before


def jsonable(value: Any) -> Any:
    """Return nested values as JSON takes them, with None for NaN and the infinities."""
    if isinstance(value, Mapping):
        return {str(key): jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
