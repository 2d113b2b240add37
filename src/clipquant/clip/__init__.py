"""Gradients in, gradients out: rules that plan, and the one function that writes."""

from clipquant.clip.adaptive import AdaGC, AutoClip, ZClip
from clipquant.clip.apply import clip_gradients_
from clipquant.clip.gradients import Gradients
from clipquant.clip.plans import Scale
from clipquant.clip.record import ClipRecord
from clipquant.clip.rules import AGC, Indicator, Norm, Rule, Value

__all__ = [
    "AGC",
    "AdaGC",
    "AutoClip",
    "ClipRecord",
    "Gradients",
    "Indicator",
    "Norm",
    "Rule",
    "Scale",
    "Value",
    "ZClip",
    "clip_gradients_",
]
