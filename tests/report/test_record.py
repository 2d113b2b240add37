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


def test_a_gain_that_rounding_cannot_explain_is_no_success() -> None:
    """An accuracy that falls from 0.947 to 0.101 is not better by 0.846, whatever mode says."""
    fallen = report(
        mode="min",
        float_metrics={"acc": 0.947},
        quantized_metrics={"acc": 0.101},
        budget=Budget(0.01),
    )
    assert "0.947 to 0.101" in fallen.suspicion
    assert "mode='min'" in fallen.suspicion
    assert "met" not in fallen.verdict
    assert fallen.figures()["quantized/budget_met"] == 0
    assert fallen.worries[0] == fallen.suspicion
    small = report(quantized_metrics={"acc": 0.902}, budget=Budget(0.01))
    assert small.suspicion == ""
    assert small.verdict.startswith("Budget met")
    assert report().suspicion == ""
    assert report(quantized_metrics={"acc": math.nan}).suspicion == ""


def test_a_report_prints_as_a_few_lines_and_shows_as_a_table() -> None:
    odd = report(failures=("exporting failed (E: x); none. Mend it.",), path="q/<b>.safetensors")
    text = repr(odd)
    assert text == str(odd)
    assert text.count("\n") < 8
    for said in (
        "1 kB -> 250 bytes",
        "acc (monitored): 0.900 -> 0.880, worse by 0.02",
        "exporting failed",
        "q/<b>",
    ):
        assert said in text
    page = odd._repr_html_()
    assert page.startswith("<table>")
    assert "<td>0.880</td>" in page
    assert "<b>" not in page


def test_what_to_worry_about_is_told_with_the_most_serious_first() -> None:
    export = {"format": "onnx", "error": "no graph"}
    bad = report(
        size_bytes=2000,
        budget=Budget(0.95, failure="too large"),
        exports=(export,),
        failures=("a",),
    )
    assert [w.split(":")[0][:20] for w in bad.worries] == [
        "Budget missed", "max_drop=0.95 lets a", "The file has 2,000 b", "Export onnx failed", "a",
    ]  # fmt: skip
    assert report().worries == ()


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
