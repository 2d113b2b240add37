"""onnxruntime's own static quantization (QDQ), told the artifact's scales and what to make of ranges."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clipquant.export.example import Example, reason
from clipquant.export.parts.capture import quiet
from clipquant.export.parts.places import held_scales, places_of
from clipquant.export.parts.recurrent import hold_recurrent
from clipquant.export.parts.sessions import feeds, open_any
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx

CALIBRATION = ("MinMax", "Percentile", "Entropy")
MULTIPLIED = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1}  # where their weight stands
_LARGEST = 1e30  # of an activation that has a range: beyond it stand masks


@dataclass(frozen=True)
class QdqFile:
    """An ONNX file with weights and activations in 8 bits.

    Args:
        method: How its activation ranges were calibrated, of `CALIBRATION`.
        weighted_only: Whether operators without weights compute in float.
        data: Its bytes.
        kept: Weights whose codes and scales are the artifact's.
        left: Kinds of operators left in float because onnxruntime cannot quantize them -> its reason.
        floats: Weights that stand in it in float.
    """

    method: str
    weighted_only: bool
    data: bytes
    kept: frozenset[str]
    left: Mapping[str, str] = field(default_factory=dict)
    floats: frozenset[str] = frozenset()


@dataclass(frozen=True)
class ActivationRanges:
    """Ranges of a float file's activations.

    Args:
        method: How they were calibrated, of `CALIBRATION`.
        ranges: What onnxruntime's calibrator gave, by the names of activations.
        fed: One batch, by the names of inputs.
        endless: Activations that hold an infinity or no number, as a mask of -inf does.
    """

    method: str
    ranges: Mapping[str, tuple[float, float]]
    fed: Mapping[str, np.ndarray]
    endless: frozenset[str] = frozenset()


def activation_ranges(source: Path, method: str, batches: Sequence[Example]) -> ActivationRanges:
    """Return the range of each activation of a float ONNX file, seen batch after batch.

    Args:
        source: The float file; others are written beside it.
        method: Of `CALIBRATION`.
        batches: Calls whose activations set the ranges.
    """
    session = open_any(source)
    given = [feeds(session, batch) for batch in batches]
    with quiet():
        seen = _ranges(source, "MinMax", given, frozenset())
        endless = frozenset(name for name, ends in seen.items() if not _bounded(ends))
        if method != "MinMax":
            seen = _ranges(source, method, given, endless)
    bounded = {name: ends for name, ends in seen.items() if name not in endless}
    return ActivationRanges(method, bounded, given[0], endless)


def _ranges(
    source: Path, method: str, given: Sequence[Mapping[str, np.ndarray]], leave: frozenset[str]
) -> dict[str, tuple[float, float]]:
    """Return the range of each activation but those that are to be left."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator

    calibrator = create_calibrator(
        source,
        augmented_model_path=str(source.with_name(f"{method}.augmented")),
        calibrate_method=CalibrationMethod[method],
    )
    if leave:
        calibrator.tensors_to_calibrate = set(calibrator.tensors_to_calibrate) - leave
    for fed in given:  # the collectors stack the batches of one call, which may differ in size
        calibrator.collect_data(_reader([fed]))
    ranges = {name: tensor.range_value for name, tensor in calibrator.compute_data().items()}
    return {name: (float(np.min(low)), float(np.max(high))) for name, (low, high) in ranges.items()}


def _bounded(ends: tuple[float, float]) -> bool:
    return all(abs(end) < _LARGEST for end in ends)  # False for NaN too


def quantize_qdq(
    source: Path,
    activations: ActivationRanges,
    weights: QuantizedWeights,
    weighted_only: bool = False,
) -> QdqFile:
    """Return a float ONNX file in QDQ form.

    Operators that touch an infinity stay in float; so does a kind of operator that onnxruntime cannot
    quantize, where that lets it quantize the others.

    Args:
        source: The float file; others are written beside it.
        activations: The ranges of its activations.
        weights: The artifact's, whose codes are kept where the form can hold them.
        weighted_only: Leave operators without weights in float.
    """
    import onnx

    graph = onnx.load(source).graph
    scales, kept = held_scales(graph, weights)
    clips = dict(_clips(graph))
    fixed = _fixed_ranges(_clipped(graph, clips, activations.ranges)) | scales
    nodes = list(_weighted(graph)) if weighted_only else None
    endless = set(_endless_nodes(graph, activations.endless)) | clips.keys()
    method = activations.method
    try:
        data = _quantize_static(source, activations.fed, fixed, nodes, endless)
    except Exception as error:  # onnxruntime fails on some operators in many ways
        first = error
    else:
        return _finished(method, weighted_only, data, weights, kept)
    for kind in dict.fromkeys(node.op_type for node in graph.node):
        own = {node.name for node in graph.node if node.op_type == kind}
        try:
            data = _quantize_static(source, activations.fed, fixed, nodes, endless | own)
        except Exception:
            continue
        return _finished(method, weighted_only, data, weights, kept, {kind: reason(first)})
    raise first


def _finished(
    method: str,
    weighted_only: bool,
    data: bytes,
    weights: QuantizedWeights,
    kept: frozenset[str],
    left: Mapping[str, str] | None = None,
) -> QdqFile:
    """Return a file with the weights of its recurrent layers as int8, and what became of each weight."""
    import onnx
    from onnx import numpy_helper

    data, recurrent = hold_recurrent(data, weights)
    graph = onnx.load_from_string(data).graph
    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    in_float = {key for key, t in weights.tensors.items() if next(places_of(t, floats), None)}
    kept = (kept | recurrent) - in_float
    return QdqFile(method, weighted_only, data, kept, left or {}, frozenset(in_float))


def _quantize_static(
    source: Path,
    fed: Mapping[str, np.ndarray],
    fixed: Mapping[str, list[dict[str, Any]]],
    nodes: list[str] | None,
    leave: set[str],
) -> bytes:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    target = source.with_name("int8.onnx")
    with quiet():
        quantize_static(
            source,
            target,
            _reader([fed]),  # names what is calibrated; the ranges are given
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_quantize=nodes,
            nodes_to_exclude=sorted(leave),
            extra_options={"WeightSymmetric": True, "TensorQuantOverrides": dict(fixed)},
        )
    return target.read_bytes()


def _endless_nodes(graph: onnx.GraphProto, endless: frozenset[str]) -> Iterator[str]:
    """Yield the names of the nodes that read or write an activation or a constant that is not finite."""
    from onnx import numpy_helper

    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    floats = {name: array for name, array in arrays.items() if array.dtype == np.float32}
    bad = endless | {name for name, a in floats.items() if not np.all(np.abs(a) < _LARGEST)}
    for node in graph.node:
        if bad.intersection(node.input) or bad.intersection(node.output):
            yield node.name


def _clips(graph: onnx.GraphProto) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the name of each Clip with an upper end, and the names of what it reads and writes.

    onnxruntime would drop it and let codes end at its ends; but ours go on beyond it, so it stays, in float.
    """
    for node in graph.node:
        if node.op_type == "Clip" and len(node.input) > 2 and node.input[2]:
            yield node.name, (node.input[0], node.output[0])


def _clipped(
    graph: onnx.GraphProto,
    clips: Mapping[str, tuple[str, str]],
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, tuple[float, float]]:
    """Return the ranges, those of what only a Clip reads as narrow as what it writes."""
    used = Counter(name for node in graph.node for name in node.input)
    outputs = {output.name for output in graph.output}
    narrow = {
        read: ranges[written]
        for read, written in clips.values()
        if used[read] == 1 and read not in outputs and written in ranges
    }
    return {**ranges, **narrow}


def _weighted(graph: onnx.GraphProto) -> Iterator[str]:
    """Yield the names of the nodes that multiply by a constant or look rows up in one."""
    constants = {initializer.name for initializer in graph.initializer}
    for node in graph.node:
        place = {**MULTIPLIED, "Gather": 0}.get(node.op_type)
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


def _fixed_ranges(
    ranges: Mapping[str, tuple[float, float]],
) -> dict[str, list[dict[str, Any]]]:
    """Return each activation's range, twice as wide upwards, so that its codes end at 127."""
    overrides = {}
    for name, (low, high) in ranges.items():
        low, high = min(low, 0.0), max(high, 0.0)
        bounds = {"rmin": np.float32(low), "rmax": np.float32(low + (high - low) * 255 / 127)}
        overrides[name] = [bounds]
    return overrides
