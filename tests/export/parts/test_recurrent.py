"""Recurrent weights of an int8 file: int8, the artifact's codes, the same outputs."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from clipquant.export import Example, export_onnx_int8
from clipquant.export.parts.recurrent import hold_recurrent
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Reads(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.head = kind(12, 16, 2, batch_first=True), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.layer(x)[0][:, -1])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("bits", [8, 4])
def test_recurrent_weights_are_int8_in_the_file_and_notes_are_true(kind, bits, tmp_path):
    torch.manual_seed(0)
    model, calls = Reads(kind).eval(), [Example((torch.randn(8, 5, 12),))]
    weights = quantize_weights(model, Recipe(bits))
    record = export_onnx_int8(model, weights, calls[0], tmp_path / "a.onnx", calibration=calls)
    arrays = [numpy_helper.to_array(i) for i in onnx.load(tmp_path / "a.onnx").graph.initializer]
    assert [
        a.shape for a in arrays if a.dtype == np.float32 and a.ndim > 1 and a.shape[-1] > 4
    ] == [
        a.shape for a in arrays if a.dtype == np.float32 and a.ndim == 2 and a.shape[0] == 1
    ]  # biases alone
    again = " ".join(note for note in record.notes if "rounded to int8 again" in note)
    assert ("layer.weight_ih_l0" in again) == (bits == 4)
    assert "stay in float in this file" not in " ".join(record.notes)
    session = ort.InferenceSession(tmp_path / "a.onnx")
    actual = session.run(None, {"x": calls[0].args[0].numpy()})[0]
    expected = calls[0].run(model).numpy()
    assert np.abs(actual - expected).max() < (0.05 if bits == 8 else 0.5) * np.abs(expected).max()


def test_a_file_without_recurrent_layers_is_left_as_it_is():
    node = onnx.helper.make_node("Neg", ["x"], ["y"])
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph([node], "g", [value("x", 1, [2])], [value("y", 1, [2])])
    data = onnx.helper.make_model(graph).SerializeToString()
    weights = quantize_weights(nn.Linear(3, 2), Recipe(8))
    assert hold_recurrent(data, weights) == (data, frozenset())
