"""Quantized weights as ONNX holds them: integers, DequantizeLinear, and what a fractional zero adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipquant.quant.codes.grid import group, symmetric_zero
from clipquant.quant.codes.tensor import QuantizedTensor

if TYPE_CHECKING:
    import onnx_ir as ir

WIDTH_SINCE = {8: 13, 4: 21, 2: 25}  # opset of the integers of a width; blocks came with 21
BLOCKS_SINCE = 21
_PARTS = ("scale", "point", "zero")


@dataclass(frozen=True)
class StoredWeight:
    """A weight as integers for DequantizeLinear, `w = scale * (codes - point) - scale * zero`.

    Args:
        codes: int16 codes, in the shape of the weight, or of its (rows, columns) matrix.
        width: Bits that the file takes a code: 2, 4 or 8.
        signed: Whether the codes are signed.
        scale: Floating: scalar, one an index of `axis`, or (rows, groups).
        point: uint8 zero point like `scale`, where every zero is such a code; else None.
        zero: Fractional zero like `scale`, subtracted after; else None.
        axis: The axis along which scales differ; None: one scale.
        block_size: Neighbours along `axis` that share a scale; 0: not in blocks.
        per_group: Whether each group is a row of the codes, the last of a row filled up.
    """

    codes: Tensor
    width: int
    signed: bool
    scale: Tensor
    point: Tensor | None
    zero: Tensor | None
    axis: int | None
    block_size: int = 0
    per_group: bool = False

    @property
    def opset(self) -> int:
        """The lowest opset that holds it."""
        return max(WIDTH_SINCE[self.width], BLOCKS_SINCE if self.block_size else 0)


def stored_width(tensor: QuantizedTensor, opset: int | None = None) -> int:
    """Return the narrowest width of ONNX integers, among those of `opset`, that holds the codes.

    >>> from clipquant.quant.methods.rtn import quantize_weight
    >>> from clipquant.quant.codes.spec import QuantSpec
    >>> tensor = quantize_weight(torch.eye(4), QuantSpec(2))
    >>> stored_width(tensor), stored_width(tensor, opset=21), stored_width(tensor, opset=20)
    (2, 4, 8)
    """
    bits = int(tensor.bits.max()) if isinstance(tensor.bits, Tensor) else tensor.bits
    return min(
        width
        for width, since in WIDTH_SINCE.items()
        if width >= bits and (opset is None or since <= opset or width == 8)
    )


def stored_weight(tensor: QuantizedTensor, opset: int | None = None) -> StoredWeight:
    """Return a quantized weight as integers for DequantizeLinear, without any loss.

    A symmetric grid becomes signed codes around 0. An integer zero becomes the zero point. A
    fractional zero, which DequantizeLinear cannot hold, is kept beside the codes as it is. Groups are
    its blocks; below the opset that has blocks, each is a row of its own.

    Args:
        tensor: The weight.
        opset: The opset to stay within. None: whichever is needed.
    """
    width = stored_width(tensor, opset)
    codes = tensor.codes.to(torch.int16)
    grid, point, zero = tensor.grid, None, tensor.zero
    if zero is None:
        middle = torch.as_tensor(symmetric_zero(grid.levels))
        codes = codes - middle.to(torch.int16)
    elif bool(((zero == zero.round()) & (zero >= 0) & (zero < 2**width)).all()):
        point, zero = zero.to(torch.uint8), None
    form = StoredWeight(codes, width, tensor.zero is None, tensor.scale, point, zero, 0)
    return _place(form, tensor, blocks=opset is None or opset >= BLOCKS_SINCE)


def _place(form: StoredWeight, tensor: QuantizedTensor, *, blocks: bool) -> StoredWeight:
    """Put codes into the weight's own shape where one axis of it carries the scales."""
    layout, groups = tensor.layout, tensor.scale.shape[1]
    if groups > 1 and blocks:
        return _replace(form, axis=1, block_size=tensor.group_size)
    if groups > 1:
        codes = group(form.codes, tensor.group_size).flatten(0, 1)
        flat = {k: v.reshape(-1) for k in _PARTS if (v := getattr(form, k)) is not None}
        return _replace(form, codes=codes, per_group=True, **flat)
    one = tensor.scale.numel() == 1
    flat = {k: v.reshape(() if one else -1) for k in _PARTS if (v := getattr(form, k)) is not None}
    if one or layout.axis == 0 or (layout.groups == 1 and not layout.stacked):
        codes = layout.unfold(form.codes)
        return _replace(form, codes=codes, axis=None if one else layout.axis, **flat)
    return _replace(form, **flat)


def _replace(form: StoredWeight, **changes: Any) -> StoredWeight:
    return StoredWeight(**{**vars(form), **changes})


class Emitter:
    """Nodes and initializers that rebuild one weight, named after it.

    Args:
        name: The weight's name in the graph.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.nodes: list[ir.Node] = []
        self.initializers: list[ir.Value] = []

    def constant(
        self, suffix: str, array: np.ndarray, dtype: ir.DataType | None = None
    ) -> ir.Value:
        """Return an initializer of the graph."""
        import onnx_ir as ir

        name = f"{self.name}.{suffix}"
        tensor = ir.Tensor(array, dtype=dtype, name=name)
        value = ir.Value(
            name=name,
            const_value=tensor,
            shape=ir.Shape(array.shape),
            type=ir.TensorType(tensor.dtype),
        )
        self.initializers.append(value)
        return value

    def op(self, op_type: str, inputs: Sequence[ir.Value | None], **attributes: Any) -> ir.Value:
        """Return the output of a new node."""
        import onnx_ir as ir

        name = f"{self.name}.{op_type}_{len(self.nodes)}"
        node = ir.node(op_type, inputs, attributes=attributes, name=f"{name}.node")
        node.outputs[0].name = name
        self.nodes.append(node)
        return node.outputs[0]

    def shape(self, suffix: str, sizes: Sequence[int]) -> ir.Value:
        return self.constant(suffix, np.array(sizes, dtype=np.int64))


def emit_weight(name: str, tensor: QuantizedTensor, form: StoredWeight) -> Emitter:
    """Return the nodes that give a weight from its integers, as the last one's output.

    Args:
        name: The weight's name in the graph.
        tensor: The weight.
        form: As the file holds it.
    """
    import onnx_ir as ir

    emit = Emitter(name)
    kind = ir.DataType[f"{'INT' if form.signed else 'UINT'}{form.width}"]
    codes = emit.constant("q", form.codes.numpy().astype(kind.numpy()), kind)
    scale = _float(emit, "scale", form.scale)
    inputs = [codes, scale]
    if form.point is not None:
        inputs.append(emit.constant("zero", form.point.numpy().astype(kind.numpy()), kind))
    weight = emit.op("DequantizeLinear", inputs, **_axis(form))
    if form.zero is not None:
        weight = emit.op("Sub", [weight, _offset(emit, form, scale)])
    if form.per_group:
        weight = _join_groups(emit, weight, tensor)
    if form.per_group or tuple(form.codes.shape) != tensor.layout.shape:
        weight = _unfold(emit, weight, tensor)
    if tensor.dtype != torch.float32:
        emit.op("Cast", [weight], to=_onnx_dtype(tensor.dtype))
    return emit


def _axis(form: StoredWeight) -> dict[str, int]:
    if form.axis is None:
        return {}
    return {"axis": form.axis} | ({"block_size": form.block_size} if form.block_size else {})


def _float(emit: Emitter, suffix: str, values: Tensor) -> ir.Value:
    """Return a float32 value that the file holds in the smaller dtype that `values` have."""
    import onnx_ir as ir

    if values.dtype == torch.float16:
        half = emit.constant(suffix, values.contiguous().numpy())
        return emit.op("Cast", [half], to=ir.DataType.FLOAT.value)
    return emit.constant(suffix, values.contiguous().float().numpy())


def _offset(emit: Emitter, form: StoredWeight, scale: ir.Value) -> ir.Value:
    """Return `scale * zero` in a shape that broadcasts to the codes'."""
    assert form.zero is not None  # noqa: S101 - the caller's condition
    offset = emit.op("Mul", [scale, _float(emit, "zero", form.zero)])
    if form.axis is None:
        return offset
    if not form.block_size:
        sizes = [1] * form.codes.dim()
        sizes[form.axis] = form.codes.shape[form.axis]
        return emit.op("Reshape", [offset, emit.shape("offset_shape", sizes)])
    return _expand_blocks(emit, form, offset)


def _expand_blocks(emit: Emitter, form: StoredWeight, offset: ir.Value) -> ir.Value:
    """Repeat each block's offset along its columns; a short last block is cut."""
    rows, columns = form.codes.shape
    blocks, size = form.scale.shape[1], form.block_size
    offset = emit.op("Unsqueeze", [offset, emit.shape("block_axis", [2])])
    offset = emit.op("Expand", [offset, emit.shape("blocks", [rows, blocks, size])])
    offset = emit.op("Reshape", [offset, emit.shape("offset_shape", [rows, blocks * size])])
    return _cut(emit, offset, blocks * size, columns)


def _join_groups(emit: Emitter, groups: ir.Value, tensor: QuantizedTensor) -> ir.Value:
    """Return (rows x groups, group size) as the (rows, columns) matrix, its filling cut off."""
    whole = tensor.scale.shape[1] * tensor.group_size
    sizes = emit.shape("rows_shape", [tensor.layout.rows, whole])
    matrix = emit.op("Reshape", [groups, sizes])
    return _cut(emit, matrix, whole, tensor.layout.columns)


def _cut(emit: Emitter, matrix: ir.Value, width: int, columns: int) -> ir.Value:
    """Return the first columns of a matrix that is `width` wide."""
    if width == columns:
        return matrix
    ends = [emit.shape(k, [v]) for k, v in (("start", 0), ("end", columns), ("cut_axis", 1))]
    return emit.op("Slice", [matrix, *ends])


def _unfold(emit: Emitter, matrix: ir.Value, tensor: QuantizedTensor) -> ir.Value:
    """Return the (rows, columns) matrix as the weight, as `Layout.unfold` does."""
    layout = tensor.layout
    if layout.axis == -1:
        turned = [*layout.shape[:-2], layout.shape[-1], layout.shape[-2]]
        matrix = emit.op("Reshape", [matrix, emit.shape("turned_shape", turned)])
        order = [*range(len(turned) - 2), len(turned) - 1, len(turned) - 2]
        return emit.op("Transpose", [matrix], perm=order)
    if layout.axis == 1:
        sizes = [layout.groups, layout.shape[1], layout.shape[0] // layout.groups]
        sizes += layout.shape[2:]
        matrix = emit.op("Reshape", [matrix, emit.shape("grouped_shape", sizes)])
        order = [0, 2, 1, *range(3, len(sizes))]
        matrix = emit.op("Transpose", [matrix], perm=order)
    return emit.op("Reshape", [matrix, emit.shape("shape", layout.shape)])


def _onnx_dtype(dtype: torch.dtype) -> int:
    import onnx_ir as ir

    names = {
        torch.float16: ir.DataType.FLOAT16,
        torch.bfloat16: ir.DataType.BFLOAT16,
        torch.float64: ir.DataType.DOUBLE,
    }
    return names[dtype].value


def keeps_codes(tensor: QuantizedTensor) -> bool:
    """Return whether an int8 file can hold exactly the artifact's codes of a weight."""
    if isinstance(tensor.bits, Tensor) or tensor.bits != 8:
        return False
    narrow = tensor.symmetric and tensor.levels == 254 and not tensor.layout.stacked
    return narrow and tensor.scale.shape[1] == 1 and tensor.layout.groups == 1
