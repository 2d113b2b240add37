"""What was gained and what it cost, as a record, a table and a page."""

from clipquant.report.files import environment, write_report
from clipquant.report.layers import bits_per_weight, layer_records
from clipquant.report.page import render_page
from clipquant.report.record import (
    Budget,
    Histogram,
    Latency,
    LayerRecord,
    QuantizationReport,
    Trial,
)
from clipquant.report.stored import describe, report_of

__all__ = [
    "Budget",
    "Histogram",
    "Latency",
    "LayerRecord",
    "QuantizationReport",
    "Trial",
    "bits_per_weight",
    "describe",
    "environment",
    "layer_records",
    "render_page",
    "report_of",
    "write_report",
]
