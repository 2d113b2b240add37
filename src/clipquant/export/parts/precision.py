"""Models of other precisions, whose files compute in float32."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from clipquant.export.example import Example
from clipquant.export.parts.subject import Subject
from clipquant.quant.codes.weights import QuantizedWeights


def in_float32(model: nn.Module) -> tuple[str, ...]:
    """Turn a model of another precision into float32, in place; return a note that says so.

    >>> in_float32(nn.Linear(2, 1)), in_float32(nn.Linear(2, 1).half())
    ((), ("the model's float16 became float32: so are the file's inputs and outputs",))
    """
    kinds = _kinds(model)
    if kinds <= {torch.float32}:
        return ()
    model.float()
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds - {torch.float32}))
    return (f"the model's {names} became float32: so are the file's inputs and outputs",)


def cast(example: Example) -> Example:
    """Return a call with its floating tensors in float32."""
    return example.map(lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


def without_bfloat16(subject: Subject) -> tuple[Subject, tuple[str, ...]]:
    """Return a subject of bfloat16 in float32, which ONNX's operators take, and a note; others as they are."""
    model, example = subject.call()
    if torch.bfloat16 not in _kinds(model):
        return subject, ()
    wide = copy.deepcopy(model)
    notes = in_float32(wide)
    calls = [cast(call) for call in subject.calibration]
    weights = _wide_weights(subject.weights)
    own = replace(subject, weights=weights, model=wide, example=cast(example), calibration=calls)
    return own, notes


def _kinds(model: nn.Module) -> set[torch.dtype]:
    values = (v for v in model.state_dict().values() if isinstance(v, Tensor))
    return {value.dtype for value in values if value.is_floating_point()}


def _wide_weights(weights: QuantizedWeights) -> QuantizedWeights:
    tensors = {name: replace(t, dtype=torch.float32) for name, t in weights.tensors.items()}
    floats = {n: t.float() if t.is_floating_point() else t for n, t in weights.floats.items()}
    return replace(weights, tensors=tensors, floats=floats)
