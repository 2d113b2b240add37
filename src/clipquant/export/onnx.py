"""An ONNX file with float activations, whose quantized weights stand in it as integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from clipquant.export.example import Example, ExportError, largest_difference, reason
from clipquant.export.parts.capture import Capture, capture, quiet
from clipquant.export.parts.format import Calls, Format
from clipquant.export.parts.onnx_graph import (
    BASE_OPSET,
    EXTRA,
    PACKAGES,
    dequantized_copy,
    name_sizes,
    output_names,
    require_onnx,
    strip_debug_info,
    tensors_only,
    to_ir,
)
from clipquant.export.parts.onnx_weights import emit_weight, stored_weight, stored_width
from clipquant.export.parts.precision import without_bfloat16
from clipquant.export.parts.record import ExportRecord
from clipquant.export.parts.sessions import feeds, open_any, open_calls
from clipquant.export.parts.subject import Subject
from clipquant.files import write_whole
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

_IR_VERSION = {2: 13}  # of the file, where its integers need a later one than the exporter writes


@dataclass(frozen=True)
class Onnx(Format):
    """ONNX with float activations, the weights as integers of 2, 4 or 8 bits.

    Args:
        opset: Version of the operator set. None: the lowest from 20 that holds the widths.
    """

    opset: int | None = None
    name = "onnx"
    suffix = ".onnx"
    needs = PACKAGES
    extra = EXTRA

    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        subject, notes = without_bfloat16(subject)
        model, example = subject.call()
        record = export_onnx(model, subject.weights, example, path, opset=self.opset)
        return replace(record, notes=(*notes, *record.notes))

    def open(self, path: str | Path, threads: int | None = None) -> Calls:
        return open_calls(path, threads)


def export_onnx(
    model: nn.Module,
    weights: QuantizedWeights,
    example: Example,
    path: str | Path,
    *,
    opset: int | None = None,
) -> ExportRecord:
    """Write an ONNX file that holds the quantized weights as integers, with DequantizeLinear.

    Widths of 1 and 2 bits take two bits a code, 3 and 4 take four, 5 to 8 take eight; what is
    stored wider than the artifact holds it stands in the notes. A fractional zero is subtracted
    after DequantizeLinear, exactly.

    Args:
        model: A module of the architecture that was quantized; not touched.
        weights: Its quantized weights.
        example: A call that it accepts.
        path: Name of the file.
        opset: Version of the operator set, 18 or later. None: the lowest from 20 that holds the
            widths.

    Returns:
        What was written, with the largest difference of onnxruntime's outputs from the
        dequantized model's.

    Raises:
        ImportError: If onnx or onnxruntime is missing; names the extra.
        ExportError: If the model cannot be captured, has no ONNX form, or needs a later opset.
        OSError: If the file cannot be written.
    """
    require_onnx()
    plain = dequantized_copy(model, weights)
    outputs = example.run(plain)
    names = output_names(outputs)
    captured = capture(tensors_only(plain, outputs), example)
    failures: list[str] = []
    for version in _versions(weights, opset):
        try:
            data, notes = _build(captured, weights, version, names)
            difference = _difference(plain, captured, data)
        except Exception as error:  # exporter and runtime raise errors of many kinds
            failures.append(f"opset {version}: {reason(error)}")
            continue
        write_whole(path, data)
        said = (*captured.notes, *notes, *failures)
        return ExportRecord("onnx", str(path), len(data), difference, said)
    raise ExportError(
        f"{type(model).__name__} has no ONNX form here: {'; '.join(failures)}. "
        "Export pt2, or replace the operator that is named."
    )


def _versions(weights: QuantizedWeights, opset: int | None) -> list[int]:
    """Return the opsets to try, the one that suits the widths best first."""
    forms = [stored_weight(tensor).opset for tensor in weights.tensors.values()]
    if opset is not None:
        return [opset]
    best = max([BASE_OPSET, *forms])
    return [best, *(version for version in (21, BASE_OPSET) if version < best)]


def _build(
    captured: Capture, weights: QuantizedWeights, opset: int, names: list[str]
) -> tuple[bytes, tuple[str, ...]]:
    """Return the file's bytes and its notes."""
    import onnx
    import onnx_ir as ir

    model = to_ir(captured, opset, names)
    held = dict(_held(model.graph, weights))
    _optimize_around(model, held)
    for value, name in held.items():
        _insert(model.graph, value, weights.tensors[name], opset)
    if any(stored_width(weights.tensors[name], opset) == 2 for name in held.values()):
        model.ir_version = max(model.ir_version, _IR_VERSION[2])
    strip_debug_info(model)
    if captured.dynamic:
        name_sizes(model.graph)
    model.producer_name = "clipquant"
    model.doc_string = (
        "Weights are integers. In onnxruntime set session.disable_quant_qdq=1, which turns them "
        "into floats once, when the file is loaded, instead of at every call."
    )
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return proto.SerializeToString(), tuple(_widened(weights, held.values(), opset))


def _held(graph: ir.Graph, weights: QuantizedWeights) -> Iterator[tuple[ir.Value, str]]:
    """Yield each initializer of the graph that is a quantized weight, with the weight's key."""
    keys = {name: name for name in weights.tensors}
    keys |= {a: name for a, name in weights.aliases.items() if name in weights.tensors}
    for key, name in keys.items():
        if key in graph.initializers:
            yield graph.initializers[key], name


def _optimize_around(model: ir.Model, held: Mapping[ir.Value, str]) -> None:
    """Simplify the graph with the quantized weights as inputs, so that none is folded away."""
    import onnxscript.optimizer

    for value in held:
        model.graph.initializers.pop(str(value.name))
        value.const_value = None
        model.graph.inputs.append(value)
    with quiet():
        onnxscript.optimizer.optimize_ir(model)
    for value in held:
        model.graph.inputs.remove(value)


def _insert(graph: ir.Graph, value: ir.Value, tensor: QuantizedTensor, opset: int) -> None:
    """Put a weight's integers and the nodes that dequantize them in the place of `value`.

    Between them and a MatMul stand its Transpose and a Max of one input, which changes nothing:
    without it onnxruntime takes both for a product that it computes with activations rounded to
    8 bits, unless it is told otherwise. A session that turns integers into floats once does the
    same with the Max.
    """
    import onnx_ir as ir

    emit = emit_weight(str(value.name), tensor, stored_weight(tensor, opset))
    multiplied = any(node.op_type in ("Transpose", "MatMul") for node, _ in value.uses())
    if multiplied and emit.nodes[-1].op_type == "DequantizeLinear":
        emit.op("Max", [emit.nodes[-1].outputs[0]])
    weight = emit.nodes[-1].outputs[0]
    ir.convenience.replace_all_uses_with(value, weight)
    for initializer in emit.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(graph[0], emit.nodes)
    weight.name, weight.type, weight.shape = value.name, value.type, value.shape


def _widened(weights: QuantizedWeights, names: Iterable[str], opset: int) -> Iterator[str]:
    """Yield a note for each width that the file holds in more bits than the artifact."""
    wider: dict[tuple[str, int], list[str]] = {}
    for name in names:
        tensor = weights.tensors[name]
        width = stored_width(tensor, opset)
        if isinstance(tensor.bits, Tensor):
            wider.setdefault(("rows of several widths", width), []).append(name)
        elif tensor.bits < width:
            wider.setdefault((f"{tensor.bits}-bit codes", width), []).append(name)
    for (what, width), keys in wider.items():
        yield f"{what} take {width} bits each in ONNX (opset {opset}): {', '.join(keys)}"


def _difference(plain: nn.Module, captured: Capture, data: bytes) -> float:
    """Return how far onnxruntime's outputs lie from the model's."""
    session = open_any(data)
    check = captured.check
    actual = session.run(None, feeds(session, check))
    return largest_difference(check.run(plain), [torch.from_numpy(array) for array in actual])
