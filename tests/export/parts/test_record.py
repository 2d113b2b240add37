"""Timings are records; their names are for readers alone."""

import json

import pytest

from clipquant.export import ExportRecord, Timing


def test_the_names_of_figures_come_from_the_timings():
    record = ExportRecord("onnx-int8", timings=(Timing(1, 0.5, 0.25, 4), Timing(32, 8, 16, 4)))
    assert record.latency == {
        "threads": 4.0,
        "batch 1, float, ms": 0.5,
        "batch 1, int8, ms": 0.25,
        "batch 1, ratio": 0.5,
        "batch 32, float, ms": 8,
        "batch 32, int8, ms": 16,
        "batch 32, ratio": pytest.approx(2.0),
    }
    assert ExportRecord("pt2").latency == {}


def test_json_holds_both():
    record = ExportRecord("x", "a/b", 3, 0.1, ("n",), {"acc": 0.5}, (Timing(1, 2, 1, 1, "codes"),))
    read = json.loads(json.dumps(record.to_dict()))
    assert read["timings"] == [
        {"batch": 1, "float_ms": 2, "own_ms": 1, "threads": 1, "what": "codes"}
    ]
    assert read["latency"]["batch 1, codes, ms"] == 1
