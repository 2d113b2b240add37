"""The nodes that rebuild a weight from integers give the weight, in every width, layout and grid."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

from clipquant.export.parts.onnx_weights import emit_weight, stored_weight, stored_width
from clipquant.quant.codes.grid import Coded, Grid
from clipquant.quant.codes.layout import Layout
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.codes.tensor import QuantizedTensor, dequantize
from clipquant.quant.methods.rtn import quantize_weight


def weight_model(tensor: QuantizedTensor, opset: int | None = None) -> onnx.ModelProto:
    """A graph without inputs whose one output is the weight."""
    form = stored_weight(tensor, opset)
    emit = emit_weight("w", tensor, form)
    out = emit.nodes[-1].outputs[0]
    out.type = ir.TensorType(
        {torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16}[tensor.dtype]
    )
    out.shape = ir.Shape(tensor.layout.shape)
    graph = ir.Graph(
        [],
        [out],
        nodes=emit.nodes,
        initializers=emit.initializers,
        opset_imports={"": opset or max(form.opset, 20)},
        name="g",
    )
    return ir.to_proto(ir.Model(graph, ir_version=13 if form.width == 2 else 10))


def run(model: onnx.ModelProto) -> torch.Tensor:
    session = ort.InferenceSession(model.SerializeToString())
    return torch.from_numpy(session.run(None, {})[0])


def close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    span = float(expected.abs().max()) + 1e-12
    return float((actual.double() - expected.double()).abs().max()) <= 1e-6 * span


LAYOUTS = [
    Layout((6, 35)),
    Layout((5, 3, 3, 3)),
    Layout((6, 2, 3, 3), axis=1),
    Layout((6, 2, 3), axis=1, groups=3),
]


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(1, 8),
    layout=st.sampled_from(LAYOUTS),
    granularity=st.sampled_from(["tensor", "channel", 4, 5, 7]),
    symmetric=st.booleans(),
    shift=st.sampled_from([0.0, 3.0]),
    opset=st.sampled_from([None, 20, 21]),
    seed=st.integers(0, 99),
)
def test_the_graph_gives_the_weight(bits, layout, granularity, symmetric, shift, opset, seed):
    torch.manual_seed(seed)
    spec = QuantSpec(bits, symmetric=symmetric and bits > 1, granularity=granularity)
    tensor = quantize_weight(torch.randn(layout.shape) + shift, spec, layout)
    model = weight_model(tensor, opset)
    onnx.checker.check_model(model, full_check=True)
    expected = dequantize(tensor)
    assert close(run(model), expected)
    assert close(torch.from_numpy(ReferenceEvaluator(model).run(None, {})[0]), expected)


@pytest.mark.parametrize(("bits", "width"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8)])
def test_codes_take_the_narrowest_width_that_onnx_has(bits, width):
    tensor = quantize_weight(torch.randn(8, 64), QuantSpec(bits))
    assert stored_width(tensor) == width
    kind = weight_model(tensor).graph.initializer
    stored = next(i for i in kind if i.name == "w.q")
    assert len(stored.raw_data) == 8 * 64 * width // 8


def test_symmetric_8_bit_codes_are_the_artifacts_around_zero():
    tensor = quantize_weight(torch.randn(4, 9), QuantSpec(8))
    form = stored_weight(tensor)
    assert (form.signed, form.point, form.zero) == (True, None, None)
    assert torch.equal(form.codes, tensor.codes.to(torch.int16) - 127)


def test_an_integer_zero_becomes_the_zero_point():
    grid = Grid(torch.full((2, 1), 0.5), torch.tensor([[3.0], [0.0]]), 15, 4)
    codes = torch.tensor([[0, 3, 9, 15], [1, 2, 3, 4]], dtype=torch.uint8)
    tensor = QuantizedTensor(Coded(codes, grid), 4, Layout((2, 4)), torch.float32)
    form = stored_weight(tensor)
    assert form.zero is None
    assert form.point.tolist() == [3, 0]
    assert torch.equal(run(weight_model(tensor)), dequantize(tensor))


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_different_widths_take_the_widest(symmetric):
    bits = torch.tensor([0, 1, 2, 3, 4], dtype=torch.uint8)
    codes = torch.randint(0, 256, (5, 6)) % (2 ** bits.long())[:, None]
    scale = torch.rand(5, 1) + 0.5
    zero = None if symmetric else torch.rand(5, 1)
    grid = Grid(scale, zero, (2 ** bits.long() - 1)[:, None], 6)
    tensor = QuantizedTensor(
        Coded(codes.to(torch.uint8), grid), bits, Layout((5, 6)), torch.float32
    )
    assert stored_width(tensor) == 4
    assert close(run(weight_model(tensor)), dequantize(tensor))


def test_a_constant_row_is_exact():
    weight = torch.tensor([[0.3, 0.3, 0.3], [-1.0, 0.0, 2.0]])
    tensor = quantize_weight(weight, QuantSpec(4))
    assert torch.equal(run(weight_model(tensor))[0], weight[0])


def test_a_half_precision_weight_keeps_its_dtype():
    tensor = quantize_weight(torch.randn(4, 8).half(), QuantSpec(4))
    assert np.array_equal(run(weight_model(tensor)).numpy(), dequantize(tensor).numpy())
