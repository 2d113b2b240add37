"""What a file says of how it was made: frozen records, checked field by field when they are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from clipquant.fields import FieldError, entries, fault, flag, items, number, text, whole

_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ+/"
_PLACES = {digit: place for place, digit in enumerate(_DIGITS)}
_BARS = 256


@dataclass(frozen=True)
class StoredBars:
    """How a float weight's values lie: its ends and the height of each bin, 0 to 63."""

    low: float
    high: float
    counts: tuple[int, ...]


@dataclass(frozen=True)
class StoredLayer:
    """What cannot be read off a weight's codes.

    Args:
        sqnr_db: None: nothing was lost.
        sensitivity: Expected increase of the loss, where it was estimated.
        note: What its reader should know.
        bars: How the float weight's values lie.
    """

    sqnr_db: float | None = None
    sensitivity: float | None = None
    note: str = ""
    bars: StoredBars | None = None


@dataclass(frozen=True)
class StoredTrial:
    """One allocation of bits that was judged; the chosen one's size is the file's, and written as 0."""

    size_bytes: int
    value: float | None
    what: str
    chosen: bool
    error: float | None = None


@dataclass(frozen=True)
class StoredBudget:
    """What was asked of the file, and the search that answered."""

    max_drop: float | None = None
    max_size: int | None = None
    failure: str = ""
    trials: tuple[StoredTrial, ...] = ()
    confidence: float | None = None
    sure: float | None = None
    unsure: str = ""


@dataclass(frozen=True)
class StoredReport:
    """A report without what the weights themselves tell.

    Args:
        before: Metrics of the float model; None: NaN or infinite.
        after: Those of the quantized model.
        monitor: The metric that judges.
        mode: "min" or "max".
        seed: The run's.
        calibration: Which data the quantizer saw.
        environment: Versions and machine.
        layers: Name of a weight -> its figures.
        budget: What was asked and found.
        failures: What could not be done when the fit ended.
        drop_error: Standard error of the monitored metric's drop; None: not known.
    """

    before: Mapping[str, float | None] = field(default_factory=dict)
    after: Mapping[str, float | None] = field(default_factory=dict)
    monitor: str | None = None
    mode: str | None = None
    seed: int | None = None
    calibration: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)
    layers: Mapping[str, StoredLayer] = field(default_factory=dict)
    budget: StoredBudget | None = None
    failures: tuple[str, ...] = ()
    drop_error: float | None = None


def write_stored(report: StoredReport) -> dict[str, Any]:
    """Return a report as JSON-able entries: "report", and "details", which a small file can do without.

    Args:
        report: What to write.

    >>> write_stored(StoredReport(seed=7, layers={"w": StoredLayer(20.0)}))
    {'report': {'seed': 7}, 'details': {'layers': {'w': [20.0, None, '']}}}
    """
    about: dict[str, Any] = {
        name: getattr(report, name)
        for name in ("monitor", "mode", "seed", "calibration", "environment")
    }
    about["failures"] = list(report.failures)
    about["drop_error"] = report.drop_error
    if report.before or report.after:
        about["metrics"] = [dict(report.before), dict(report.after)]
    details: dict[str, Any] = {
        "layers": {name: _write_layer(layer) for name, layer in report.layers.items()}
    }
    if report.budget is not None:
        asked = report.budget
        trials = [[t.size_bytes, t.value, t.what, int(t.chosen)] for t in asked.trials]
        about["budget"] = {
            "max_drop": asked.max_drop, "max_size": asked.max_size, "failure": asked.failure, "trials": trials,
        }  # fmt: skip
        chance = {
            "errors": [t.error for t in asked.trials] if any(t.error for t in asked.trials) else None,
            "confidence": asked.confidence, "sure": asked.sure, "unsure": asked.unsure,
        }  # fmt: skip
        about["budget"] |= {
            name: value for name, value in chance.items() if value not in (None, "")
        }
    about = {k: v for k, v in about.items() if v not in (None, "", {}, [])}
    return {"report": about, "details": {k: v for k, v in details.items() if v}}


def read_stored(about: Any, details: Any = None) -> StoredReport:
    """Return the report that `write_stored` wrote, or a file of version 1 holds: its inverse.

    Args:
        about: The entry "report".
        details: The entry "details"; version 1 has all of it in "report".

    Raises:
        FieldError: Naming the field that cannot be.
    """
    held = {**entries(about, "report"), **entries({} if details is None else details, "details")}
    before, after = items(held.get("metrics", [{}, {}]), "report.metrics", 2)
    layers = entries(held.get("layers", {}), "report.layers")
    return StoredReport(
        before=_metrics(before, "report.metrics[0]"),
        after=_metrics(after, "report.metrics[1]"),
        monitor=_maybe_text(held.get("monitor"), "report.monitor"),
        mode=_mode(held.get("mode")),
        drop_error=_maybe_number(held.get("drop_error"), "report.drop_error"),
        seed=_maybe_whole(held.get("seed"), "report.seed"),
        calibration=text(held.get("calibration", ""), "report.calibration"),
        environment={
            name: text(said, f"report.environment.{name}")
            for name, said in entries(held.get("environment", {}), "report.environment").items()
        },
        layers={name: _read_layer(v, f"report.layers.{name}") for name, v in layers.items()},
        budget=_read_budget(held.get("budget")),
        failures=tuple(
            text(said, "report.failures")
            for said in items(held.get("failures", []), "report.failures")
        ),
    )


def _write_layer(layer: StoredLayer) -> list[Any]:
    entry = [layer.sqnr_db, layer.sensitivity, layer.note]
    if layer.bars is None:
        return entry
    bars = "".join(_DIGITS[count] for count in layer.bars.counts)
    return [*entry, layer.bars.low, layer.bars.high, bars]


def _read_layer(value: Any, at: str) -> StoredLayer:
    entry = items(value, at)
    if len(entry) not in (3, 6):
        raise fault(at, "a list of 3 or 6", value)
    bars = None
    if len(entry) == 6:
        low, high, digits = number(entry[3], at), number(entry[4], at), text(entry[5], at, _BARS)
        if low > high:
            raise fault(at, "a histogram from its smallest to its largest weight", value)
        if not digits or not set(digits) <= _PLACES.keys():
            raise fault(at, "a histogram of digits from 0 to 63", digits)
        bars = StoredBars(low, high, tuple(_PLACES[digit] for digit in digits))
    return StoredLayer(
        _maybe_number(entry[0], at), _maybe_number(entry[1], at), text(entry[2], at), bars
    )


def _read_budget(value: Any) -> StoredBudget | None:
    if value is None:
        return None
    held, at = entries(value, "report.budget"), "report.budget"
    found = items(held.get("trials", []), f"{at}.trials")
    errors = items(held.get("errors", [None] * len(found)), f"{at}.errors", len(found))
    return StoredBudget(
        _maybe_number(held.get("max_drop"), f"{at}.max_drop"),
        _maybe_whole(held.get("max_size"), f"{at}.max_size"),
        text(held.get("failure", ""), f"{at}.failure"),
        tuple(
            _read_trial(trial, error, f"{at}.trials[{i}]")
            for i, (trial, error) in enumerate(zip(found, errors, strict=True))
        ),
        _maybe_number(held.get("confidence"), f"{at}.confidence"),
        _maybe_number(held.get("sure"), f"{at}.sure"),
        text(held.get("unsure", ""), f"{at}.unsure"),
    )


def _read_trial(value: Any, error: Any, at: str) -> StoredTrial:
    size, measured, what, chosen = items(value, at, 4)
    chosen = flag(chosen, at) if isinstance(chosen, bool) else bool(whole(chosen, at, 0, 1))
    own = _maybe_number(error, at)
    return StoredTrial(whole(size, at), _maybe_number(measured, at), text(what, at), chosen, own)


def _metrics(value: Any, at: str) -> dict[str, float | None]:
    return {name: _maybe_number(v, f"{at}.{name}") for name, v in entries(value, at).items()}


def _mode(value: Any) -> str | None:
    if value not in (None, "min", "max"):
        raise FieldError(f"report.mode must be 'min' or 'max'; got {str(value)[:40]!r}.")
    return None if value is None else str(value)


def _maybe_text(value: Any, at: str) -> str | None:
    return None if value is None else text(value, at)


def _maybe_number(value: Any, at: str) -> float | None:
    return None if value is None else number(value, at)


def _maybe_whole(value: Any, at: str) -> int | None:
    return None if value is None else whole(value, at, -(2**63))
