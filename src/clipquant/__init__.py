"""Gradient clipping and weight quantization as PyTorch Lightning callbacks."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from clipquant._version import __version__ as __version__

if TYPE_CHECKING:
    from clipquant.artifact import load_quantized
    from clipquant.callbacks.gradient_clip import GradientClipCallback
    from clipquant.callbacks.qat import QuantizationAwareTraining
    from clipquant.callbacks.quantize import QuantizeOnFitEnd
    from clipquant.callbacks.sparsify import SparsifyWeights
    from clipquant.clip import clip_gradients_
    from clipquant.model import QuantizedModel, quantize, to_compressed_tensors
    from clipquant.reference.two_conv import TwoConvNet

__all__ = [
    "GradientClipCallback",
    "QuantizationAwareTraining",
    "QuantizeOnFitEnd",
    "QuantizedModel",
    "SparsifyWeights",
    "TwoConvNet",
    "clip_gradients_",
    "load_quantized",
    "quantize",
    "to_compressed_tensors",
]

# Loaded at first use, so that the command line shows its help without waiting for torch.
_HOMES = {
    "GradientClipCallback": "clipquant.callbacks.gradient_clip",
    "QuantizationAwareTraining": "clipquant.callbacks.qat",
    "QuantizeOnFitEnd": "clipquant.callbacks.quantize",
    "QuantizedModel": "clipquant.model",
    "SparsifyWeights": "clipquant.callbacks.sparsify",
    "TwoConvNet": "clipquant.reference.two_conv",
    "clip_gradients_": "clipquant.clip",
    "load_quantized": "clipquant.artifact",
    "quantize": "clipquant.model",
    "to_compressed_tensors": "clipquant.model",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'clipquant' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
