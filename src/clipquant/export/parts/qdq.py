"""onnxruntime's own static quantization (QDQ), told the artifact's scales and what to make of ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from clipquant.export.example import Example
from clipquant.export.parts.capture import quiet
from clipquant.export.parts.sessions import feeds, open_any
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx

CALIBRATION = ("MinMax", "Percentile", "Entropy")


@dataclass(frozen=True)
class QdqFile:
    """An ONNX file with weights and activations in 8 bits.

    Args:
        method: How its activation ranges were calibrated, of `CALIBRATION`.
        weighted_only: Whether operators without weights compute in float.
        data: Its bytes.
        kept: Weights whose codes and scales are the artifact's.
    """

    method: str
    weighted_only: bool
    data: bytes
    kept: frozenset[str]


@dataclass(frozen=True)
class ActivationRanges:
    """Ranges of a float file's activations.

    Args:
        method: How they were calibrated, of `CALIBRATION`.
        ranges: What onnxruntime's calibrator gave, by the names of activations.
        fed: One batch, by the names of inputs.
    """

    method: str
    ranges: Any
    fed: Mapping[str, np.ndarray]


def activation_ranges(source: Path, method: str, batches: Sequence[Example]) -> ActivationRanges:
    """Return the range of each activation of a float ONNX file, seen batch after batch.

    Args:
        source: The float file; others are written beside it.
        method: Of `CALIBRATION`.
        batches: Calls whose activations set the ranges.
    """
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    session = open_any(source)
    given = [feeds(session, batch) for batch in batches]
    with quiet():
        calibrator = create_calibrator(
            source,
            augmented_model_path=str(source.with_name(f"{method}.augmented")),
            calibrate_method=CalibrationMethod[method],
        )
        for fed in given:  # the collectors stack the batches of one call, which may differ in size
            calibrator.collect_data(_reader([fed]))
        return ActivationRanges(method, calibrator.compute_data(), given[0])


def quantize_qdq(
    source: Path,
    activations: ActivationRanges,
    weights: QuantizedWeights,
    weighted_only: bool = False,
) -> QdqFile:
    """Return a float ONNX file in QDQ form.

    Args:
        source: The float file; others are written beside it.
        activations: The ranges of its activations.
        weights: The artifact's, whose codes are kept where the form can hold them.
        weighted_only: Leave operators without weights in float.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    target = source.with_name("int8.onnx")
    graph = onnx.load(source).graph
    scales, kept = _weights(graph, weights)
    with quiet():
        quantize_static(
            source,
            target,
            _reader([activations.fed]),  # names what is calibrated; the ranges are given
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=list(_weighted(graph)) if weighted_only else None,
            extra_options={
                "WeightSymmetric": True,
                "TensorQuantOverrides": _activations(activations.ranges) | scales,
            },
        )
    return QdqFile(activations.method, weighted_only, target.read_bytes(), kept)


def _weighted(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of the nodes that multiply by a constant or look rows up in one."""
    constants = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        place = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}.get(
            node.op_type
        )
        if place is not None and node.input[place] in constants:
            yield node.name


def _reader(given: Sequence[Mapping[str, np.ndarray]]) -> Any:
    from onnxruntime.quantization import CalibrationDataReader

    class Batches(CalibrationDataReader):  # type: ignore[misc]
        """The batches, once."""

        def __init__(self) -> None:
            self.rest = iter(given)

        def get_next(self) -> Mapping[str, np.ndarray] | None:
            return next(self.rest, None)

    return Batches()


def _activations(ranges: Any) -> dict[str, list[dict[str, Any]]]:
    """Return each activation's range, twice as wide upwards, so that its codes end at 127."""
    overrides = {}
    for name, tensor in ranges.items():
        low, high = (float(np.min(end)) for end in tensor.range_value)
        low, high = min(low, 0.0), max(high, 0.0)
        bounds = {"rmin": np.float32(low), "rmax": np.float32(low + (high - low) * 255 / 127)}
        overrides[name] = [bounds]
    return overrides


def _weights(
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
        places = list(_places(key, tensor, arrays))
        fit = [place for place in places if place[0] not in tables]
        overrides |= {name: _scales(tensor, axis) for name, axis in fit}
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


def _scales(tensor: QuantizedTensor, axis: int) -> list[dict[str, Any]]:
    from onnxruntime.quantization import QuantType

    scales = tensor.scale.float().numpy().reshape(-1)
    common: dict[str, Any] = {
        "quant_type": QuantType.QInt8,
        "zero_point": np.array(0, dtype=np.int8),
    }
    if len(scales) > 1:
        common["axis"] = axis
    return [{"scale": np.array(scale), **common} for scale in scales]


def _places(
    key: str, tensor: QuantizedTensor, arrays: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, int]]:
    """Yield each initializer that is a weight or its transpose, under any name, and its channel axis."""
    axis, weight = tensor.layout.axis, dequantize(tensor).float().numpy()
    for name, array in arrays.items():
        if name == key or np.array_equal(array, weight):
            yield name, axis
        elif weight.ndim == 2 and np.array_equal(array, weight.T):
            yield name, 1 - axis


def keeps_codes(tensor: QuantizedTensor) -> bool:
    """Return whether an int8 file can hold exactly the artifact's codes of a weight."""
    if isinstance(tensor.bits, Tensor) or tensor.bits != 8:
        return False
    narrow = tensor.symmetric and tensor.levels == 254
    return narrow and tensor.scale.shape[1] == 1 and tensor.layout.groups == 1
