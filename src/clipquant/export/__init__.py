"""Files that run elsewhere, without this package: torch.export programs, ONNX."""

from clipquant.export.example import Example, ExportError, as_example, find_example
from clipquant.export.onnx import export_onnx, require_onnx
from clipquant.export.onnx_int8 import Judgement, export_onnx_int8
from clipquant.export.pt2 import export_pt2
from clipquant.export.record import ExportRecord

__all__ = [
    "Example",
    "ExportError",
    "ExportRecord",
    "Judgement",
    "as_example",
    "export_onnx",
    "export_onnx_int8",
    "export_pt2",
    "find_example",
    "require_onnx",
]
