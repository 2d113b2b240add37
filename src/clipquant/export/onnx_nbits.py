"""An ONNX file whose linear layers are computed from codes of 2, 4 or 8 bits by onnxruntime's MatMulNBits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from clipquant.export.example import Example, largest_difference
from clipquant.export.parts.blocks import FLOAT, INT8, Blocks, blocks_of
from clipquant.export.parts.distance import relative_error
from clipquant.export.parts.format import Calls, Format
from clipquant.export.parts.onnx_graph import EXTRA, PACKAGES, dequantized_copy, require_onnx
from clipquant.export.parts.onnx_weights import Emitter
from clipquant.export.parts.precision import without_bfloat16
from clipquant.export.parts.record import ExportRecord, Timing
from clipquant.export.parts.sessions import feeds, open_any, open_calls, runner
from clipquant.export.parts.subject import Judgement, Subject
from clipquant.export.parts.timing import interleaved_medians
from clipquant.files import write_whole
from clipquant.quant.codes.tensor import QuantizedTensor
from clipquant.quant.codes.weights import QuantizedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "com.microsoft"
_ENOUGH = 0.002  # of the metric: where int8 loses more, activations stay in float
_ENOUGH_DISTANCE = 0.05  # of the outputs' size: the same without a metric


@dataclass(frozen=True)
class OnnxNbits(Format):
    """ONNX whose linear layers compute from the artifact's own codes; everything else as in `base`.

    Args:
        base: The format whose file it starts from: ONNX with float activations.
        least: Weights of a layer below which the operator's own cost outweighs its gain.
        batches: Batch sizes at which it is timed beside float.
    """

    base: Format
    least: int = 1 << 16
    batches: tuple[int, ...] = (1, 8, 64)
    name: ClassVar[str] = "onnx-nbits"
    suffix: ClassVar[str] = ".nbits.onnx"
    needs: ClassVar[tuple[str, ...]] = PACKAGES
    extra: ClassVar[str] = EXTRA
    calibrates: ClassVar[bool] = True

    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        """Write the file: activations in int8 where that loses little, else in float.

        A weight takes the operator's own form where it is multiplied as a whole, in float32, and its groups
        are a power of two from 16 on; a channel's one scale is repeated every 256 or 128 weights. What is
        fractional of a zero is taken off after the product, exactly. All others stay as in `base`.
        """
        require_onnx()
        subject, wide = without_bfloat16(subject)
        model, example = subject.call()
        with TemporaryDirectory() as folder:
            record = self.base.write(subject, Path(folder) / "base.onnx")
            source = Path(str(record.path)).read_bytes()
        plain = dequantized_copy(model, subject.weights)
        outputs = example.run(plain)
        calls = subject.calibration or [example]

        def judged(data: bytes) -> Judgement:
            forward = runner(open_any(data), outputs)
            return (
                subject.judge(forward)
                if subject.judge
                else Judgement(relative_error(plain, calls, forward), {})
            )

        enough = _ENOUGH if subject.max_drop is None else subject.max_drop
        enough = enough if subject.judge else _ENOUGH_DISTANCE
        rewritten = partial(self._rewritten, source, subject.weights)
        data, notes = rewritten(INT8)
        judgement = judged(data)
        if not judgement.drop <= enough:
            lost = judgement.drop
            data, notes = rewritten(FLOAT)
            judgement = judged(data)
            notes = (*notes, f"products in float: with activations in int8 {lost:.2g} was lost")
        write_whole(path, data)
        actual = runner(open_any(data), outputs)(*example.args, **example.kwargs)
        timings = _timings(source, data, example, self.batches)
        slower = [t.batch for t in timings if t.ratio > 1]
        warned = f"WARNING: slower than float here at batch {', '.join(map(str, slower))}"
        return ExportRecord(
            self.name,
            str(path),
            len(data),
            largest_difference(outputs, actual),
            (*wide, *record.notes, *notes, *([warned] if slower else [])),
            judgement.metrics,
            timings,
        )

    def _rewritten(
        self, source: bytes, weights: QuantizedWeights, level: int
    ) -> tuple[bytes, tuple[str, ...]]:
        """Return a file with MatMulNBits in the place of every product that can be one, and notes."""
        import onnx
        import onnx_ir as ir
        from onnx_ir.passes.common import RemoveUnusedNodesPass

        model = ir.from_proto(onnx.load_from_string(source))
        graph, left, done = model.graph, dict[str, list[str]](), 0
        tensors = weights.tensors
        keys = {name: name for name in tensors}
        keys |= {alias: name for alias, name in weights.aliases.items() if name in tensors}
        values = {str(value.name): value for node in graph for value in node.outputs}
        for key, name in keys.items():
            if key not in values:
                continue
            products = list(_products(values[key]))
            blocks = self._blocks(tensors[name], level) if products else "not multiplied as a whole"
            if isinstance(blocks, str):
                left.setdefault(blocks, []).append(name)
                continue
            held = _Constants(Emitter(f"{key}.nbits"), {})
            for number, node in enumerate(products):
                _replace_(graph, node, f"{key}.nbits{number or ''}", blocks, level, held)
            for initializer in held.emit.initializers:
                graph.register_initializer(initializer)
            done += len(products)
        RemoveUnusedNodesPass()(model)
        if done:
            model.opset_imports[DOMAIN] = 1
        kind = "int8" if level == INT8 else "float"
        notes = [f"products by MatMulNBits, activations in {kind}: {done}"]
        notes += [f"as in onnx: {', '.join(names)} ({why})" for why, names in left.items()]
        return ir.to_proto(model).SerializeToString(), tuple(notes)

    def _blocks(self, tensor: QuantizedTensor, level: int) -> Blocks | str:
        if tensor.numel < self.least:
            return f"fewer than {self.least:,} weights"
        return blocks_of(tensor, level)

    def open(self, path: str | Path, threads: int | None = None) -> Calls:
        return open_calls(path, threads)


def _products(weight: ir.Value) -> Iterator[ir.Node]:
    """Yield the nodes that multiply something with the transpose of a whole weight."""
    for node, place in weight.uses():
        if node.op_type == "Gemm" and place == 1 and _plain(node, transposed=True):
            yield node
        elif node.op_type == "Max" and len(node.inputs) == 1:
            yield from _products(node.outputs[0])
        elif node.op_type == "Transpose" and _order(node) == [1, 0]:
            for user, index in node.outputs[0].uses():
                multiplies = user.op_type == "MatMul"
                if index == 1 and (multiplies or (user.op_type == "Gemm" and _plain(user, False))):
                    yield user


def _order(node: ir.Node) -> list[int]:
    perm = node.attributes.get("perm")
    return [1, 0] if perm is None else list(perm.as_ints())


def _plain(node: ir.Node, transposed: bool) -> bool:
    """Return whether a Gemm is `a b^T + c`, or `a b + c`, and nothing more."""
    given = {name: value.value for name, value in node.attributes.items()}
    ones = given.get("alpha", 1.0) == given.get("beta", 1.0) == 1.0
    return ones and not given.get("transA", 0) and bool(given.get("transB", 0)) == transposed


@dataclass(frozen=True)
class _Constants:
    """The constants of one weight, which all products with it share."""

    emit: Emitter
    made: dict[str, ir.Value]

    def of(self, suffix: str, values: Tensor) -> ir.Value:
        if suffix not in self.made:
            self.made[suffix] = self.emit.constant(suffix, values.contiguous().numpy())
        return self.made[suffix]


def _replace_(
    graph: ir.Graph, node: ir.Node, name: str, blocks: Blocks, level: int, constants: _Constants
) -> None:
    """Put MatMulNBits, and what is taken off or added after it, in the place of a product."""
    import onnx_ir as ir

    emit, x = Emitter(name), node.inputs[0]
    parts = {
        "codes": blocks.codes,
        "scale": blocks.scale.flatten(),
        "point": blocks.point.flatten(),
    }
    held = [constants.of(suffix, part) for suffix, part in parts.items()]
    product = ir.node(
        "MatMulNBits",
        [x, *held],
        attributes={
            "K": blocks.columns, "N": len(blocks.scale), "bits": blocks.bits,
            "block_size": blocks.block, "accuracy_level": level,
        },
        domain=DOMAIN,
        name=f"{name}.node",
    )  # fmt: skip
    emit.nodes.append(product)
    out = product.outputs[0]
    out.name = f"{name}.product"
    if blocks.rest is not None:
        out = emit.op("Sub", [out, _rest(emit, x, blocks, constants)])
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None:
        out = emit.op("Add", [out, bias])
    old = node.outputs[0]
    for initializer in emit.initializers:
        graph.register_initializer(initializer)
    graph.insert_before(node, emit.nodes)
    kept = old.name
    ir.convenience.replace_all_uses_with(old, out, replace_graph_outputs=True)
    out.type, out.shape = old.type, old.shape
    graph.remove(node, safe=True)
    out.name = kept


def _rest(emit: Emitter, x: Any, blocks: Blocks, constants: _Constants) -> ir.Value:
    """Return what fractions of zeros add to a product: the sum of each group's inputs, weighted."""
    assert blocks.rest is not None  # noqa: S101 - the caller's condition
    weights = constants.of("rest", blocks.rest.T)
    if blocks.rest.shape[1] == 1:
        total = emit.op("ReduceSum", [x, emit.shape("last", [-1])], keepdims=1)
        return emit.op("Mul", [total, weights])
    groups = torch.arange(blocks.columns) // blocks.group
    sums = nn.functional.one_hot(groups, blocks.rest.shape[1]).float()
    return emit.op("MatMul", [emit.op("MatMul", [x, constants.of("sums", sums)]), weights])


def _timings(
    source: bytes, data: bytes, example: Example, batches: Sequence[int]
) -> tuple[Timing, ...]:
    """Return the latency beside float weights, on one thread, where the file takes other batch sizes."""
    sessions = {"float": open_any(source, 1), "nbits": open_any(data, 1)}
    first = (sessions["float"].get_inputs()[0].shape or [None])[0]
    sizes = [example.batch_size or 1] if isinstance(first, int) else batches
    found = []
    for size in sizes:
        call = example if isinstance(first, int) else example.resized(size)
        calls = {k: partial(s.run, None, feeds(s, call)) for k, s in sessions.items()}
        medians = interleaved_medians(calls)
        found.append(Timing(size, medians["float"], medians["nbits"], 1, "nbits"))
    return tuple(found)
