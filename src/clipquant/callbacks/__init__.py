"""Lightning callbacks."""

from clipquant.callbacks.gradient_clip import GradientClipCallback

__all__ = ["GradientClipCallback"]
