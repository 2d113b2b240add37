"""Gradient clipping and weight quantization as PyTorch Lightning callbacks."""

from clipquant.artifact import load_quantized
from clipquant.callbacks.quantize import QuantizeOnFitEnd
from clipquant.model import QuantizedModel, quantize

__all__ = ["QuantizeOnFitEnd", "QuantizedModel", "load_quantized", "quantize"]
__version__ = "0.1.0"
