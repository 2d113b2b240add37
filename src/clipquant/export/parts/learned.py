"""The ranges of activations that training has learned, for the activations of an ONNX file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from clipquant.export.example import Example
from clipquant.export.parts.places import places_of
from clipquant.export.parts.qdq import MULTIPLIED, ActivationRanges, activation_ranges
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx

TRAINED = "training"  # by which such ranges were found
_PASSING = {
    "Relu",
    "MaxPool",
    "Flatten",
    "Reshape",
    "Transpose",
    "Squeeze",
    "Unsqueeze",
    "Identity",
}


def trained_ranges(
    source: Path,
    weights: QuantizedWeights,
    ends: Mapping[str, tuple[float, float]],
    batches: Sequence[Example],
) -> ActivationRanges:
    """Return the ranges that training has learned for what weights are multiplied by; others are calibrated.

    Args:
        source: The float file.
        weights: The artifact's.
        ends: Name of a weight -> the ends of what its layer is called with.
        batches: Calls that give all other activations their ranges.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(source).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    owned = {
        place.name: ends[key]
        for key, tensor in weights.tensors.items()
        if key in ends
        for place in places_of(tensor, floats)
    }
    learned: dict[str, tuple[float, float]] = {}
    for node in graph.node:
        place = MULTIPLIED.get(node.op_type)
        if place is not None and node.input[place] in owned:
            learned[node.input[0]] = owned[node.input[place]]
    seen = activation_ranges(source, "MinMax", batches)
    ranges = {**seen.ranges, **_passed_back(graph, learned)}
    return ActivationRanges(TRAINED, ranges, seen.fed, seen.endless)


def _passed_back(
    graph: onnx.GraphProto, learned: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    """Return ranges also for what operators that pass numbers on make these activations of, where no other reads it."""
    ranges = dict(learned)
    readers = Counter(name for node in graph.node for name in node.input)
    for node in reversed(graph.node):
        if node.op_type in _PASSING and node.output[0] in ranges and readers[node.input[0]] == 1:
            ranges.setdefault(node.input[0], ranges[node.output[0]])
    return ranges
