"""Lightning callbacks: thin shells over the functional core."""

from clipquant.callbacks.gradient_clip import GradientClipCallback
from clipquant.callbacks.qat import QuantizationAwareTraining
from clipquant.callbacks.quantize import QuantizeOnFitEnd
from clipquant.callbacks.sparsify import SparsifyWeights

__all__ = [
    "GradientClipCallback",
    "QuantizationAwareTraining",
    "QuantizeOnFitEnd",
    "SparsifyWeights",
]
