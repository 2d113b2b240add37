"""Gradient clipping and weight quantization as PyTorch Lightning callbacks."""

from clipquant.artifact import load_quantized
from clipquant.callbacks.gradient_clip import GradientClipCallback
from clipquant.callbacks.quantize import QuantizeOnFitEnd
from clipquant.clip import clip_gradients_
from clipquant.model import QuantizedModel, quantize

__all__ = [
    "GradientClipCallback",
    "QuantizeOnFitEnd",
    "QuantizedModel",
    "clip_gradients_",
    "load_quantized",
    "quantize",
]
__version__ = "0.1.0"
