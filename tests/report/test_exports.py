"""Exports as rows and remarks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from clipquant import quantize
from clipquant.export import ExportRecord, Timing
from clipquant.report import QuantizationReport
from clipquant.report.exports import EXPORT_HEADER, export_remarks, export_rows, export_table


@pytest.fixture
def report() -> QuantizationReport:
    torch.manual_seed(0)
    timings = (Timing(1, 2, 1, 1), Timing(32, 4, 3, 1))
    exports = (
        ExportRecord("a", "q/a.x", 10, 1e-3, ("note",), {"acc": 0.5, "loss": 2.0}, timings),
        ExportRecord("b", "q/b.x", 20),
        ExportRecord("c", error="no graph"),
        ExportRecord("d", error="no graph"),
        ExportRecord("e", error="no room"),
    )  # fmt: skip
    made = quantize(nn.Linear(4, 4), 8).report
    return replace(made, monitor="loss", exports=tuple(export.to_dict() for export in exports))


def test_rows_show_the_monitored_metric_and_every_batch(report: QuantizationReport) -> None:
    rows = export_rows(report)
    assert rows[0] == (
        "a", "10", "loss 2", "1.000 (batch 1), 3.000 (batch 32)", "2.000 (batch 1), 4.000 (batch 32)",
    )  # fmt: skip
    assert rows[1] == ("b", "20", "-", "-", "-")
    assert [row[:2] for row in rows[2:]] == [("c", "failed"), ("d", "failed"), ("e", "failed")]
    assert export_rows(replace(report, monitor="other"))[0][2] == "acc 0.5"


def test_columns_in_which_nothing_was_measured_are_left_out(report: QuantizationReport) -> None:
    header, rows = export_table(report)
    assert header == EXPORT_HEADER
    assert rows == export_rows(report)
    bare = replace(report, exports=report.exports[1:3])
    assert export_table(bare) == (("export", "bytes"), [("b", "20"), ("c", "failed")])


def test_exports_that_failed_for_one_reason_share_a_remark(report: QuantizationReport) -> None:
    first, second, *failed = export_remarks(report)
    assert first.lines[0] == "a: a.x"
    assert "outputs within 0.001" in first.lines[1]
    assert "onnxruntime with 1 thread," in first.lines[2]
    assert first.lines[-1] == "note"
    assert second.lines == ("b: b.x",)
    assert [remark.lines for remark in failed] == [
        ("c, d failed: no graph",),
        ("e failed: no room",),
    ]
    assert [remark.failed for remark in (first, second, *failed)] == [False, False, True, True]
