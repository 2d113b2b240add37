"""The plots as XML: marks where the figures say."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clipquant.report import Budget, Histogram, LayerRecord, QuantizationReport, Trial, plots

SIZES = st.floats(1.0, 1e12)


def layer(name: str = "w", **known: Any) -> LayerRecord:
    base: dict[str, Any] = {
        "shape": (4, 4),
        "bits": 2.0,
        "method": "rtn",
        "sqnr_db": 10.0,
        "bytes": 9,
        "rows": {0: 1, 2: 3},
    }
    return LayerRecord(name, **base | known)


def marks(svg: str, tag: str, kind: str = "") -> list[ET.Element]:
    found = ET.fromstring(svg).iter(tag)
    return [
        element for element in found if kind in (element.get("class") or "").split() or not kind
    ]


def searched(**known: Any) -> QuantizationReport:
    trials = (
        Trial(400, 0.91),
        Trial(300, 0.90, chosen=True),
        Trial(310, 0.7, "uniform"),
        Trial(200, math.nan),
    )
    base: dict[str, Any] = {
        "layers": (),
        "left": (),
        "float_bytes": 1000,
        "size_bytes": 300,
        "bits_per_weight": 2.0,
        "float_metrics": {"acc": 0.92},
        "quantized_metrics": {"acc": 0.9},
        "monitor": "acc",
        "mode": "max",
        "budget": Budget(0.05, 350, trials),
    }
    return QuantizationReport(**base | known)


def test_histogram_bars_are_as_high_as_their_counts_and_levels_stand_at_their_values() -> None:
    svg = plots.histogram_plot(Histogram(-1.0, 1.0, (0, 63, 21, 7), (-1.0, 0.0, 1.0)), "<w>")
    heights = [float(bar.get("height", "")) for bar in marks(svg, "rect", "bar")]
    assert heights == pytest.approx([0, 96, 32, 10.7], abs=0.06)
    xs = [float(line.get("x1", "")) for line in marks(svg, "line", "level")]
    assert xs == pytest.approx([8, plots.WIDTH / 2, plots.WIDTH - 8])


def test_bits_are_divided_by_shares_of_rows() -> None:
    svg = plots.bits_plot([layer()])
    widths = [float(bar.get("width", "")) for bar in marks(svg, "rect")]
    assert widths == pytest.approx(
        [(plots.WIDTH - 16) / 4 - 1, 3 * (plots.WIDTH - 16) / 4 - 1], abs=0.1
    )


def test_sqnr_bars_are_in_proportion_and_exact_fills_the_width() -> None:
    records = [
        layer("a"),
        layer("b", sqnr_db=40.0),
        layer("c", sqnr_db=math.inf),
        layer("d", sqnr_db=-3.0),
    ]
    widths = [float(bar.get("width", "")) for bar in marks(plots.sqnr_plot(records), "rect")]
    full = plots.WIDTH - 16
    assert widths == pytest.approx([full / 4, full, full, 1])


def test_search_plot_shows_each_measured_trial_and_both_limits() -> None:
    svg = plots.search_plot(searched())
    assert len(marks(svg, "circle", "dot")) == 3
    assert len(marks(svg, "circle", "chosen")) == 1
    assert len(marks(svg, "circle", "uniform")) == 1
    assert len(marks(svg, "line", "limit")) == 2
    assert len(marks(svg, "line", "float")) == 1
    by_size = {c.findtext("title", "")[:3]: float(c.get("cx", "")) for c in marks(svg, "circle")}
    assert by_size["300"] < by_size["310"] < by_size["400"]


def test_search_plot_of_a_lone_trial_and_of_none() -> None:
    lone = searched(budget=Budget(None, 350, (Trial(300, 0.92, chosen=True),)))
    assert len(marks(plots.search_plot(lone), "circle")) == 1
    assert plots.search_plot(searched(budget=None)) == ""
    assert plots.search_plot(searched(float_metrics={})) == ""


@given(SIZES, SIZES)
def test_ticks_are_few_round_and_inside(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    found = plots.ticks(low, high, 5)
    assert len(found) <= 7
    assert all(low - 1e-6 * high <= tick <= high * (1 + 1e-6) for tick in found)
