"""Lightning callbacks: thin shells over the functional core."""

from clipquant.callbacks.gradient_clip import GradientClipCallback
from clipquant.callbacks.quantize import QuantizeOnFitEnd

__all__ = ["GradientClipCallback", "QuantizeOnFitEnd"]
