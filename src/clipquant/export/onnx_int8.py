"""An ONNX file with weights and activations in 8 bits, calibrated by onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from clipquant.export.example import Example, ExportError, largest_difference, reason
from clipquant.export.parts.capture import Capture, capture, quiet
from clipquant.export.parts.distance import distance_judge, relative_error
from clipquant.export.parts.format import Calls, Format
from clipquant.export.parts.learned import trained_ranges
from clipquant.export.parts.onnx_graph import (
    BASE_OPSET,
    EXTRA,
    PACKAGES,
    dequantized_copy,
    output_names,
    require_onnx,
    strip_debug_info,
    tensors_only,
    to_ir,
)
from clipquant.export.parts.precision import cast, in_float32
from clipquant.export.parts.qdq import CALIBRATION, QdqFile, activation_ranges, quantize_qdq
from clipquant.export.parts.record import ExportRecord, Timing
from clipquant.export.parts.sessions import feeds, open_any, open_calls, runner
from clipquant.export.parts.subject import Judge, Judgement, Subject
from clipquant.export.parts.timing import interleaved_medians
from clipquant.files import write_whole
from clipquant.quant.codes.weights import QuantizedWeights

BATCHES = (1, 32)
_ENOUGH = 0.01  # of the metric: a drop within which no other operators are tried, without max_drop
_COLLAPSE = 0.5  # of the outputs' norm: beyond it, a file that no metric has judged well is no file
_ENOUGH_DISTANCE = 0.1  # of the outputs' size: the same without a metric


@dataclass(frozen=True)
class OnnxInt8(Format):
    """ONNX that computes in int8, the ranges of its activations calibrated by onnxruntime."""

    name = "onnx-int8"
    suffix = ".int8.onnx"
    needs = PACKAGES
    extra = EXTRA
    calibrates = True

    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        model, example = subject.call()
        return export_onnx_int8(
            model, subject.weights, example, path,
            calibration=subject.calibration, judge=subject.judge, max_drop=subject.max_drop,
            ranges=subject.ranges,
        )  # fmt: skip

    def open(self, path: str | Path, threads: int | None = None) -> Calls:
        return open_calls(path, threads)


@dataclass(frozen=True)
class _Candidate:
    file: QdqFile
    judgement: Judgement
    failures: Mapping[str, str]  # why a calibration method gave no file, as far as was tried


def export_onnx_int8(
    model: nn.Module,
    weights: QuantizedWeights,
    example: Example,
    path: str | Path,
    *,
    calibration: Sequence[Example],
    judge: Judge | None = None,
    max_drop: float | None = None,
    ranges: Mapping[str, tuple[float, float]] | None = None,
) -> ExportRecord:
    """Write an ONNX file that computes in int8 (QDQ), with ranges calibrated by onnxruntime.

    Weights that the artifact holds in 8 bits, symmetric, a scale a channel or a tensor, keep its
    codes; tables that are looked up take one scale. Activations take codes 0 to 127, so that the
    16-bit sums of two products in CPUs without VNNI cannot overflow. Where that loses too much with
    every operator in int8, as it does in transformers, only those that hold weights are.

    Args:
        model: A module of the architecture that was quantized; not touched.
        weights: Its quantized weights.
        example: A call that it accepts.
        path: Name of the file.
        calibration: Calls whose activations set the ranges.
        judge: What a forward, run by onnxruntime, is worth. None: its distance from the model's
            outputs on the calibration data, relative to their size; the notes say so.
        max_drop: The first calibration method whose drop is at most this is taken, else the best.
            None, or without a judge: the best; operators without weights are left in float only
            where it is a hundredth of the metric worse, or a tenth of the outputs' size away.
        ranges: Name of a weight -> the ends of what its layer is called with, where training has learned
            them: these are taken, unless that loses too much.

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
    wide = in_float32(plain)
    if wide:
        example, calibration = cast(example), [cast(batch) for batch in calibration]
    outputs = example.run(plain)
    captured = capture(tensors_only(plain, outputs), example)
    with TemporaryDirectory() as folder:
        source = Path(folder) / "float.onnx"
        try:
            source.write_bytes(_float_model(captured, output_names(outputs)))
        except Exception as error:  # the exporter raises errors of many kinds
            raise ExportError(
                f"{type(model).__name__} has no ONNX form: {reason(error)}"
            ) from error
        batches = calibration if captured.dynamic else [captured.example]
        if judge is None:
            judge_here, drop, enough = distance_judge(plain, batches), None, _ENOUGH_DISTANCE
        else:
            judge_here, drop = judge, max_drop
            enough = _ENOUGH if max_drop is None else max_drop
        found = _trained(source, weights, batches, outputs, judge_here, ranges or {}, enough)
        chosen = found or _choose(source, weights, batches, outputs, judge_here, drop, enough)
        data = chosen.file.data
        apart = relative_error(plain, batches, runner(open_any(data), outputs))
        fine = judge is not None and chosen.judgement.drop <= enough
        if not fine and not apart <= _COLLAPSE:
            raise ExportError(
                f"int8 loses the outputs of {type(model).__name__}: they differ from the quantized model's by "
                f"{apart:.0%} of their size on the calibration data. Export 'onnx', whose activations stay in "
                "float, or give calibration data that are like those of use."
            )
        timings = _timings(source.read_bytes(), data, captured)
    write_whole(path, data)
    session, check = open_any(data), captured.check
    actual = runner(session, outputs)(*check.args, **check.kwargs)
    by = _by_distance(chosen.judgement) if judge is None else ()
    notes = (
        *captured.notes,
        *wide,
        *_notes(chosen.file, weights, timings),
        *by,
        *chosen.failures.values(),
    )
    return ExportRecord(
        "onnx-int8",
        str(path),
        len(data),
        largest_difference(check.run(plain), actual),
        notes,
        chosen.judgement.metrics,
        timings,
    )


def _float_model(captured: Capture, names: list[str]) -> bytes:
    import onnx_ir as ir
    import onnxscript.optimizer
    from onnx_ir.passes.common import DeduplicateInitializersPass

    model = to_ir(captured, BASE_OPSET, names)
    size = 1 << 40  # weights of any size
    with quiet():
        # Behind a Transpose, weights would count as activations.
        onnxscript.optimizer.optimize_ir(model, input_size_limit=size, output_size_limit=size)
    DeduplicateInitializersPass(size_limit=size)(model)
    strip_debug_info(model)
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _trained(
    source: Path,
    weights: QuantizedWeights,
    batches: Sequence[Example],
    outputs: Any,
    judge: Judge,
    ranges: Mapping[str, tuple[float, float]],
    enough: float,
) -> _Candidate | None:
    """Return the file of the ranges that training has learned, where there are some and it loses little."""
    if not ranges:
        return None
    try:
        learned = trained_ranges(source, weights, ranges, batches)
        for weighted_only in (False, True):
            file = quantize_qdq(source, learned, weights, weighted_only)
            judgement = judge(runner(open_any(file.data), outputs))
            if judgement.drop <= enough:
                return _Candidate(file, judgement, {})
    except Exception:  # quantizer and runtime raise errors of many kinds; calibration alone may do
        return None
    return None


def _choose(
    source: Path,
    weights: QuantizedWeights,
    batches: Sequence[Example],
    outputs: Any,
    judge: Judge,
    max_drop: float | None,
    enough: float,
) -> _Candidate:
    """Return the first calibration within `max_drop`, or the best of all that gave ranges.

    Operators without weights are left in float only where the best with all of them is not within
    `enough`.
    """
    ranges = cache(lambda method: activation_ranges(source, method, batches))
    candidates: list[_Candidate] = []
    failures: dict[str, str] = {}
    for weighted_only in (False, True):
        for method in (method for method in CALIBRATION if method not in failures):
            try:
                file = quantize_qdq(source, ranges(method), weights, weighted_only)
                session = open_any(file.data)
            except (
                Exception
            ) as error:  # calibrator, quantizer and runtime raise errors of many kinds
                failures[method] = f"{method} calibration failed: {reason(error)}"
                continue
            judgement = judge(runner(session, outputs))
            candidates.append(_Candidate(file, judgement, failures))
            if max_drop is not None and judgement.drop <= max_drop:
                return candidates[-1]
        if candidates and _best(candidates).judgement.drop <= enough:
            break
    if not candidates:
        raise ExportError(
            f"no calibration gave ranges: {'; '.join(dict.fromkeys(failures.values()))}. Export 'onnx', whose "
            "activations stay in float."
        )
    return _best(candidates)


def _best(candidates: Sequence[_Candidate]) -> _Candidate:
    return min(candidates, key=lambda candidate: candidate.judgement.drop)


def _timings(plain: bytes, int8: bytes, captured: Capture) -> tuple[Timing, ...]:
    """Return the latency of the int8 file beside the float one's, measured in turn."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = cores or 1
    sessions = {"float": open_any(plain, threads), "int8": open_any(int8, threads)}
    sizes = BATCHES if captured.dynamic else (captured.example.batch_size or 1,)
    timings = []
    for size in sizes:
        call = captured.example.resized(size) if captured.dynamic else captured.example
        calls = {
            name: partial(session.run, None, feeds(session, call))
            for name, session in sessions.items()
        }
        medians = interleaved_medians(calls)
        timings.append(Timing(size, medians["float"], medians["int8"], threads))
    return tuple(timings)


def _by_distance(judgement: Judgement) -> Iterable[str]:
    yield (
        "judged by the distance of its outputs from the quantized model's on the calibration data, "
        f"{judgement.drop:.2g} of their largest: no metric was measured on this file"
    )


def _notes(file: QdqFile, weights: QuantizedWeights, timings: Sequence[Timing]) -> Iterable[str]:
    yield f"activation ranges by {file.method}"
    if file.weighted_only:
        yield "only operators that hold weights compute in int8: with all of them more was lost"
    for kind, why in file.left.items():
        yield f"{kind} stays in float: onnxruntime cannot quantize it here ({why})"
    if file.floats:
        yield f"weights that stay in float in this file: {', '.join(sorted(file.floats))}"
    changed = [name for name in weights.tensors if name not in file.kept | file.floats]
    if changed:
        yield (
            "weights that are not 8 bits, symmetric, per channel in the artifact, and tables that are "
            f"looked up, were rounded to int8 again: {', '.join(changed)}"
        )
    for timing in timings:
        if timing.ratio > 1:
            yield (
                f"WARNING: int8 is slower than float here (batch {timing.batch}, ratio {timing.ratio:.2f}): use "
                "the float ONNX file on this machine"
            )
