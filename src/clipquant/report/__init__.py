"""What was gained and what it cost, as a record, a table and a page."""

from clipquant.report.record import LayerRecord, QuantizationReport, bits_per_weight, layer_records

__all__ = ["LayerRecord", "QuantizationReport", "bits_per_weight", "layer_records"]
