"""Files that run elsewhere, without this package: torch.export programs, ONNX, compressed-tensors."""

from clipquant.export.example import Example, ExportError, as_example, find_example
from clipquant.export.formats import FORMATS, as_format
from clipquant.export.onnx import export_onnx
from clipquant.export.onnx_int8 import export_onnx_int8
from clipquant.export.parts.format import Format
from clipquant.export.parts.onnx_graph import require_onnx
from clipquant.export.parts.record import ExportRecord, Timing
from clipquant.export.parts.subject import Judgement, Subject
from clipquant.export.pt2 import export_pt2

__all__ = [
    "FORMATS",
    "Example",
    "ExportError",
    "ExportRecord",
    "Format",
    "Judgement",
    "Subject",
    "Timing",
    "as_example",
    "as_format",
    "export_onnx",
    "export_onnx_int8",
    "export_pt2",
    "find_example",
    "require_onnx",
]
