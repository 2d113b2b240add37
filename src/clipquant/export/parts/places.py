"""Where an ONNX file holds the artifact's weights, under whatever name, and the scales that it keeps of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from clipquant.export.parts.onnx_weights import keeps_codes
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx

_ROUNDING = 1e-5  # of a channel's largest: what folding a factor into a weight adds, and no more


@dataclass(frozen=True)
class Place:
    """An initializer that is a weight, or its transpose, each channel times a factor.

    Args:
        name: Its name.
        axis: Its axis of channels.
        factors: One a channel: 1, or what a BatchNorm behind it was folded to.
    """

    name: str
    axis: int
    factors: np.ndarray


def held_scales(
    graph: onnx.GraphProto, weights: QuantizedWeights
) -> tuple[dict[str, list[dict[str, Any]]], frozenset[str]]:
    """Return the artifact's scales of what the file can hold by them, and the weights that are so kept.

    What a Gather reads is not: onnxruntime takes the table's scale and codes for those of its output,
    where scales of single rows fit nothing, and codes must end at 127 like those of any activation.
    """
    from onnx import numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    tables = {node.input[0] for node in graph.node if node.op_type == "Gather"}
    floats = {name for name, array in arrays.items() if array.dtype == np.float32}
    overrides = {name: [_table(arrays[name])] for name in tables & floats}
    kept: set[str] = set()
    for key, tensor in weights.tensors.items():
        if not keeps_codes(tensor):
            continue
        places = list(places_of(tensor, {name: arrays[name] for name in floats}))
        fit = [place for place in places if place.name not in tables]
        overrides |= {place.name: _scales(tensor, place) for place in fit}
        if places and len(fit) == len(places):
            kept.add(key)
    return overrides, frozenset(kept)


def _table(array: np.ndarray) -> dict[str, Any]:
    """Return the scale and zero point that map a table onto codes 0 to 127."""
    from onnxruntime.quantization import QuantType

    low, high = min(float(array.min(initial=0.0)), 0.0), max(float(array.max(initial=0.0)), 0.0)
    scale = (high - low) / 127 or 1.0
    return {
        "quant_type": QuantType.QUInt8,
        "scale": np.array(scale, dtype=np.float32),
        "zero_point": np.array(round(-low / scale), dtype=np.uint8),
    }


def _scales(tensor: QuantizedTensor, place: Place) -> list[dict[str, Any]]:
    from onnxruntime.quantization import QuantType

    scales = tensor.scale.float().numpy().reshape(-1)
    if not np.all(place.factors == 1):
        scales = (
            np.abs(place.factors).astype(np.float32) * scales
        )  # a factor below 0 turns codes round
    common: dict[str, Any] = {
        "quant_type": QuantType.QInt8,
        "zero_point": np.array(0, dtype=np.int8),
    }
    if len(scales) > 1:
        common["axis"] = place.axis
    return [{"scale": np.array(scale), **common} for scale in scales]


def places_of(tensor: QuantizedTensor, arrays: Mapping[str, np.ndarray]) -> Iterator[Place]:
    """Yield each initializer that holds a weight, under whatever name."""
    axis, weight = tensor.layout.axis, dequantize(tensor).float().numpy()
    for name, array in arrays.items():
        if array.shape == weight.shape and (factors := _factors(array, weight, axis)) is not None:
            yield Place(name, axis, factors)
        elif (
            weight.ndim == 2
            and array.shape == weight.T.shape
            and (factors := _factors(array.T, weight, axis)) is not None
        ):
            yield Place(name, 1 - axis, factors)


def _factors(array: np.ndarray, weight: np.ndarray, axis: int) -> np.ndarray | None:
    """Return what each channel of `weight` is multiplied by to give `array`; None: it is another weight."""
    if np.array_equal(array, weight):
        return np.ones(weight.shape[axis])
    one, other = (
        np.moveaxis(a, axis, 0).reshape(a.shape[axis], -1).astype(float) for a in (array, weight)
    )
    squares = np.square(other).sum(1)
    factors = np.divide((one * other).sum(1), squares, out=np.ones(len(other)), where=squares > 0)
    exact = np.abs(one - factors[:, None] * other).max(initial=0.0, axis=1)
    within = exact <= _ROUNDING * np.abs(one).max(initial=0.0, axis=1)
    return factors if bool(within.all() and factors.all()) else None
