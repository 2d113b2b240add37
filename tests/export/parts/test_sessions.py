"""Sessions suit their files, and stand for a model's forward."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from clipquant.export import Example
from clipquant.export.parts.sessions import feeds, open_any, open_calls, runner


def model_of(*nodes, sizes=("batch", 3), initializers=()):
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [value("x", TensorProto.FLOAT, sizes)], [value("y", TensorProto.FLOAT, None)],
        initializer=list(initializers),
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 21)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


PLAIN = model_of(helper.make_node("Neg", ["x"], ["y"]))
QUANTIZES = model_of(
    helper.make_node("QuantizeLinear", ["x", "s"], ["q"]),
    helper.make_node("DequantizeLinear", ["q", "s"], ["y"]),
    initializers=[helper.make_tensor("s", TensorProto.FLOAT, [], [0.5])],
)


@pytest.mark.parametrize("model", [PLAIN, QUANTIZES], ids=["float", "int8"])
def test_a_file_and_its_bytes_open_alike(model, tmp_path):
    onnx.save(model, tmp_path / "a.onnx")
    x = np.array([[0.6, -1.0, 2.2]], dtype=np.float32)
    for source in (tmp_path / "a.onnx", str(tmp_path / "a.onnx"), model.SerializeToString()):
        (y,) = open_any(source, threads=1).run(None, {"x": x})
        # Codes are kept where activations are quantized: there the rounding to halves is to be seen.
        expected = -x if model is PLAIN else np.clip(np.rint(x / 0.5), 0, 255) * 0.5
        assert np.array_equal(y, expected)


def test_only_a_file_without_quantized_activations_turns_its_integers_into_floats():
    options = [open_any(m.SerializeToString()).get_session_options() for m in (PLAIN, QUANTIZES)]
    folded = [o.get_session_config_entry("session.disable_quant_qdq") for o in options[:1]]
    assert folded == ["1"]
    with pytest.raises(RuntimeError):
        options[1].get_session_config_entry("session.disable_quant_qdq")


def test_runner_gives_outputs_in_the_model_s_form():
    session = open_any(PLAIN.SerializeToString())
    forward = runner(session, {"first": torch.zeros(1), "rest": (3, "kept")})
    x = torch.randn(2, 3)
    outputs = forward(x)
    assert torch.equal(outputs["first"], -x)
    assert outputs["rest"] == (3, "kept")
    assert list(feeds(session, Example((), {"anything": x}))) == ["x"]


def test_calls_are_made_for_any_batch_that_the_file_leaves_open(tmp_path):
    onnx.save(PLAIN, tmp_path / "a.onnx")
    assert open_calls(tmp_path / "a.onnx")(5)()[0].shape == (5, 3)
    onnx.save(model_of(helper.make_node("Neg", ["x"], ["y"]), sizes=(2, 3)), tmp_path / "b.onnx")
    assert open_calls(tmp_path / "b.onnx")(5) is None
    assert open_calls(tmp_path / "b.onnx")(2)()[0].shape == (2, 3)
    loose = model_of(helper.make_node("Neg", ["x"], ["y"]), sizes=("batch", "length"))
    onnx.save(loose, tmp_path / "c.onnx")
    assert open_calls(tmp_path / "c.onnx")(5)()[0].shape == (5, 32)
