"""Gradient clipping and weight quantization as PyTorch Lightning callbacks."""

__version__ = "0.1.0"
