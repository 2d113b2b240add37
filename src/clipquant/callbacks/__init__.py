"""Lightning callbacks: thin shells over the functional core."""

from clipquant.callbacks.quantize import QuantizeOnFitEnd

__all__ = ["QuantizeOnFitEnd"]
