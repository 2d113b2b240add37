"""Quantizing without a Trainer: a model in, a `QuantizedModel` out."""

from clipquant.model.convert import to_compressed_tensors
from clipquant.model.entry import quantize
from clipquant.model.quantized import QuantizedModel

__all__ = ["QuantizedModel", "quantize", "to_compressed_tensors"]
