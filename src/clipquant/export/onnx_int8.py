"""An ONNX file with weights and activations in 8 bits, calibrated by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from clipquant.export.bench import interleaved_medians
from clipquant.export.capture import Capture, capture, quiet
from clipquant.export.example import Example, ExportError, largest_difference, reason
from clipquant.export.onnx import (
    BASE_OPSET,
    dequantized_copy,
    feeds,
    open_session,
    output_names,
    require_onnx,
    to_ir,
)
from clipquant.export.record import ExportRecord, write_whole
from clipquant.quant.grid import dequantize
from clipquant.quant.model import QuantizedWeights
from clipquant.quant.spec import QuantizedTensor

if TYPE_CHECKING:
    import onnx
    import onnxruntime as ort

CALIBRATION = ("MinMax", "Percentile", "Entropy")
BATCHES = (1, 32)
Forward: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class Judgement:
    """What a file is worth.

    Args:
        drop: How much worse than the float model, in the units of the metric that judges.
        metrics: Every metric that was measured.
    """

    drop: float
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class _Candidate:
    method: str
    data: bytes
    judgement: Judgement


def export_onnx_int8(
    model: nn.Module,
    weights: QuantizedWeights,
    example: Example,
    path: str | Path,
    *,
    calibration: Sequence[Example],
    judge: Callable[[Forward], Judgement] | None = None,
    max_drop: float | None = None,
) -> ExportRecord:
    """Write an ONNX file that computes in int8 (QDQ), with ranges calibrated by onnxruntime.

    Weights that the artifact holds in 8 bits, symmetric, a scale a channel or a tensor, keep its
    codes. Activations take codes 0 to 127, so that the 16-bit sums of two products in CPUs without
    VNNI cannot overflow.

    Args:
        model: A module of the architecture that was quantized; not touched.
        weights: Its quantized weights.
        example: A call that it accepts.
        path: Name of the file.
        calibration: Calls whose activations set the ranges.
        judge: What a forward, run by onnxruntime, is worth. None: its distance from the model's
            outputs on the calibration data, relative to their size.
        max_drop: The first calibration method whose drop is at most this is taken. None: the best.

    Returns:
        What was written, with the method, metrics, and latency beside the float ONNX model.

    Raises:
        ImportError: If onnx or onnxruntime is missing; names the extra.
        ExportError: If there are no calibration data, or the model has no ONNX form.
        OSError: If the file cannot be written.
    """
    require_onnx()
    if not calibration:
        raise ExportError(
            "onnx-int8 needs calibration data for the ranges of activations; got none."
        )
    plain = dequantized_copy(model, weights)
    captured = capture(plain, example)
    outputs = captured.example.run(plain)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        try:
            source.write_bytes(_float_model(captured, output_names(outputs)))
        except Exception as error:  # the exporter raises errors of many kinds
            raise ExportError(
                f"{type(model).__name__} has no ONNX form: {reason(error)}"
            ) from error
        batches = calibration if captured.dynamic else [captured.example]
        judge = judge or _distance(plain, batches)
        chosen = _choose(source, weights, batches, outputs, judge, max_drop)
        latency = _latency(source.read_bytes(), chosen.data, captured)
    write_whole(path, chosen.data)
    session, check = open_session_int8(chosen.data), captured.check
    actual = runner(session, outputs)(*check.args, **check.kwargs)
    notes = (*captured.notes, *_notes(chosen, weights, latency))
    return ExportRecord(
        "onnx-int8",
        str(path),
        len(chosen.data),
        largest_difference(check.run(plain), actual),
        notes,
        chosen.judgement.metrics,
        latency,
    )


def open_session_int8(file: bytes | str | Path, threads: int | None = None) -> ort.InferenceSession:
    """Return an onnxruntime session that computes in int8 where the file says so."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    if threads is not None:
        options.intra_op_num_threads = threads
    source = file if isinstance(file, bytes) else str(file)
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def runner(session: ort.InferenceSession, outputs: Any) -> Forward:
    """Return a function that stands for a model's forward, run by a session.

    Args:
        session: Of the exported model.
        outputs: Outputs of the model, whose structure is given back.
    """
    leaves, structure = pytree.tree_flatten(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        call = Example(args, kwargs)
        device = call.tensors[0].device
        given = iter(session.run(None, feeds(session, call)))
        filled = [
            torch.from_numpy(next(given)).to(device) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        return pytree.tree_unflatten(filled, structure)

    return forward


def _float_model(captured: Capture, names: list[str]) -> bytes:
    import onnx_ir as ir
    import onnxscript.optimizer

    model = to_ir(captured, BASE_OPSET, names)
    with quiet():
        onnxscript.optimizer.optimize_ir(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _distance(plain: nn.Module, batches: Sequence[Example]) -> Callable[[Forward], Judgement]:
    """Return a judge by the relative error of the outputs, where there is no metric."""

    def judge(forward: Forward) -> Judgement:
        errors = []
        for batch in batches:
            expected = batch.run(plain)
            size = max((float(t.abs().max()) for t in pytree.tree_leaves(expected)), default=1.0)
            errors.append(
                largest_difference(expected, forward(*batch.args, **batch.kwargs)) / (size or 1.0)
            )
        return Judgement(float(np.mean(errors)), {})

    return judge


def _choose(
    source: Path,
    weights: QuantizedWeights,
    batches: Sequence[Example],
    outputs: Any,
    judge: Callable[[Forward], Judgement],
    max_drop: float | None,
) -> _Candidate:
    """Return the first calibration method within `max_drop`, or the best of all."""
    candidates: list[_Candidate] = []
    for method in CALIBRATION:
        data = _quantize(source, method, weights, batches)
        judgement = judge(runner(open_session_int8(data), outputs))
        candidates.append(_Candidate(method, data, judgement))
        if max_drop is not None and judgement.drop <= max_drop:
            return candidates[-1]
    return min(candidates, key=lambda candidate: candidate.judgement.drop)


def _quantize(
    source: Path, method: str, weights: QuantizedWeights, batches: Sequence[Example]
) -> bytes:
    import onnx
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.calibrate import create_calibrator

    target = source.with_name(f"{method}.onnx")
    session = open_session_int8(source)
    given = [feeds(session, batch) for batch in batches]
    with quiet():
        calibrator = create_calibrator(
            source,
            augmented_model_path=str(target.with_suffix(".augmented")),
            calibrate_method=CalibrationMethod[method],
        )
        for (
            fed
        ) in given:  # one at a time: the collectors stack the batches of a call, which may differ
            calibrator.collect_data(_reader([fed]))
        ranges = calibrator.compute_data()
        quantize_static(
            source,
            target,
            _reader(given[:1]),  # names what is calibrated; the ranges are given
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options={
                "WeightSymmetric": True,
                "TensorQuantOverrides": _activations(ranges)
                | _weights(onnx.load(source).graph, weights),
            },
        )
    return target.read_bytes()


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


def _weights(graph: onnx.GraphProto, weights: QuantizedWeights) -> dict[str, list[dict[str, Any]]]:
    """Return the artifact's scales for those of its weights whose codes the file can hold."""
    from onnx import numpy_helper
    from onnxruntime.quantization import QuantType

    arrays = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    overrides: dict[str, list[dict[str, Any]]] = {}
    for key, tensor in weights.tensors.items():
        if not keeps_codes(tensor):
            continue
        name, axis = _find(key, tensor, arrays)
        if name is None:
            continue
        scales = tensor.scale.float().numpy().reshape(-1)
        place = {"axis": axis} if len(scales) > 1 else {}
        common = {"quant_type": QuantType.QInt8, "zero_point": np.array(0, dtype=np.int8), **place}
        overrides[name] = [{"scale": np.array(scale), **common} for scale in scales]
    return overrides


def _find(
    key: str, tensor: QuantizedTensor, arrays: Mapping[str, np.ndarray]
) -> tuple[str | None, int]:
    """Return the initializer that is a weight, or its transpose under another name, and its axis."""
    axis = tensor.layout.axis
    if key in arrays:
        return key, axis
    if len(tensor.layout.shape) != 2:
        return None, axis
    turned = dequantize(tensor).float().numpy().T
    found = (k for k, v in arrays.items() if v.shape == turned.shape and np.array_equal(v, turned))
    return next(found, None), 1 - axis


def keeps_codes(tensor: QuantizedTensor) -> bool:
    """Return whether an int8 file can hold exactly the artifact's codes of a weight."""
    if isinstance(tensor.bits, Tensor) or tensor.bits != 8:
        return False
    narrow = tensor.symmetric and tensor.levels == 254
    return narrow and tensor.scale.shape[1] == 1 and tensor.layout.groups == 1


def _latency(plain: bytes, int8: bytes, captured: Capture) -> dict[str, float]:
    """Return milliseconds of the float and the int8 file, and their ratio, measured in turn."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    sessions = {
        "float": open_session(plain, threads),
        "int8": open_session_int8(int8, threads),
    }
    latency: dict[str, float] = {"threads": float(threads or 1)}
    sizes = BATCHES if captured.dynamic else (captured.example.batch_size or 1,)
    for size in sizes:
        call = captured.example.resized(size) if captured.dynamic else captured.example
        calls = {
            name: partial(session.run, None, feeds(session, call))
            for name, session in sessions.items()
        }
        medians = interleaved_medians(calls)
        latency |= {f"batch {size}, {name}, ms": ms for name, ms in medians.items()}
        latency[f"batch {size}, ratio"] = medians["int8"] / medians["float"]
    return latency


def _notes(
    chosen: _Candidate, weights: QuantizedWeights, latency: Mapping[str, float]
) -> Iterable[str]:
    yield f"activation ranges by {chosen.method}"
    changed = [name for name, tensor in weights.tensors.items() if not keeps_codes(tensor)]
    if changed:
        yield (
            "weights that are not 8 bits, symmetric, per channel in the artifact were rounded to "
            f"int8 again: {', '.join(changed)}"
        )
    for name, ratio in latency.items():
        if name.endswith("ratio") and ratio > 1:
            yield (
                f"WARNING: int8 is slower than float here ({name} {ratio:.2f}): use the float "
                "ONNX file on this machine"
            )
