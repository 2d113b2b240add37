"""The formats that are known by name: the callback, the command line and the bench read this one table."""

from __future__ import annotations

from clipquant.errors import ArgumentError
from clipquant.export.compressed_tensors import CompressedTensors
from clipquant.export.onnx import Onnx
from clipquant.export.onnx_int8 import OnnxInt8
from clipquant.export.onnx_nbits import OnnxNbits
from clipquant.export.parts.format import Format
from clipquant.export.pt2 import Pt2

FORMATS: dict[str, Format] = {
    known.name: known
    for known in (Pt2(), Onnx(), OnnxInt8(), OnnxNbits(Onnx()), CompressedTensors())
}


def as_format(given: str | Format) -> Format:
    """Return the format of a name, or a format itself.

    Args:
        given: One of `FORMATS`, or a format of one's own.

    Raises:
        ArgumentError: For another name, listing those that are known.

    >>> as_format("onnx").suffix
    '.onnx'
    """
    if isinstance(given, Format):
        return given
    if not isinstance(given, str) or given not in FORMATS:
        raise ArgumentError(f"a format is one of {known_names()}; got {given!r}.")
    return FORMATS[given]


def known_names() -> str:
    """Return the names of all formats as a message lists them."""
    return ", ".join(map(repr, FORMATS))
