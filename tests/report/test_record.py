"""The record's own figures: drop, verdict, what loggers get, JSON."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from clipquant.report import Budget, QuantizationReport, Trial


def report(**known: Any) -> QuantizationReport:
    base: dict[str, Any] = {
        "layers": (),
        "left": (),
        "float_bytes": 1000,
        "size_bytes": 250,
        "bits_per_weight": 4.5,
        "float_metrics": {"acc": 0.9},
        "quantized_metrics": {"acc": 0.88},
        "monitor": "acc",
        "mode": "max",
    }
    return QuantizationReport(**base | known)


def test_drop_counts_worse_as_positive_both_ways() -> None:
    assert report().drop == pytest.approx(0.02)
    assert report(mode="min").drop == pytest.approx(-0.02)
    assert report(monitor="other").drop is None


def test_verdict_says_met_missed_or_what_was_gained() -> None:
    assert report().verdict == "250 bytes, 4.00 times smaller; acc worse by 0.02"
    met = report(budget=Budget(0.05, 300))
    assert met.verdict.startswith("Budget met: drop at most 0.05 and at most 300 bytes (250 bytes")
    missed = report(budget=Budget(0.01, None, failure="the smallest drop found is 0.02"))
    assert missed.verdict.startswith("Budget missed: the smallest drop found is 0.02")
    assert "unchanged" in report(quantized_metrics={"acc": 0.9}).verdict
    assert "better by 0.05" in report(quantized_metrics={"acc": 0.95}).verdict


def test_loggers_get_metrics_and_figures_under_one_prefix() -> None:
    figures = report(budget=Budget(0.01, failure="missed")).figures()
    assert figures == {
        "quantized/acc": 0.88,
        "quantized/size_bytes": 250.0,
        "quantized/ratio": 4.0,
        "quantized/bits_per_weight": 4.5,
        "quantized/drop": pytest.approx(0.02),
        "quantized/budget_met": 0.0,
    }


def test_json_holds_no_nan() -> None:
    odd = report(quantized_metrics={"acc": math.nan}, budget=Budget(trials=(Trial(3, math.inf),)))
    read = json.loads(json.dumps(odd.to_dict(), allow_nan=False))
    assert read["quantized_metrics"] == {"acc": None}
    assert read["budget"]["trials"][0]["value"] is None
    assert read["ratio"] == 4.0


def test_the_record_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        report().size_bytes = 1  # type: ignore[misc]
    assert replace(report(), size_bytes=500).ratio == 2.0
