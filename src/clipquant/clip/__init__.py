"""Gradients in, gradients out: rules that plan, and the one function that writes."""

from clipquant.clip.apply import ClipRecord, clip_gradients_
from clipquant.clip.norms import Gradients
from clipquant.clip.rules import AGC, Indicator, Norm, Rule, Value

__all__ = [
    "AGC",
    "ClipRecord",
    "Gradients",
    "Indicator",
    "Norm",
    "Rule",
    "Value",
    "clip_gradients_",
]
