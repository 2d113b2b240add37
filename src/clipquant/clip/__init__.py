"""Gradients in, gradients out: rules that plan, and the one function that writes."""

from clipquant.clip.apply import clip_gradients_ as clip_gradients_
from clipquant.clip.gradients import Gradients as Gradients
from clipquant.clip.plan import Plan as Plan
from clipquant.clip.record import ClipRecord as ClipRecord
from clipquant.clip.rule import Rule as Rule
from clipquant.clip.rules import *  # noqa: F403 - whatever rules there are
from clipquant.clip.scale import Scale as Scale
