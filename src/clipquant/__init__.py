"""Gradient clipping and weight quantization as PyTorch Lightning callbacks."""

from clipquant.artifact import load_quantized
from clipquant.model import QuantizedModel, quantize

__all__ = ["QuantizedModel", "load_quantized", "quantize"]
__version__ = "0.1.0"
