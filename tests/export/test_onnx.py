import importlib.util
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import clipquant
from clipquant.artifact import serialize
from clipquant.export import Example, ExportError, export_onnx
from clipquant.export.example import largest_difference
from clipquant.export.onnx import dequantized_copy, output_names
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import TwoConvNet

SERVE = """
import numpy as np, onnxruntime as ort
for floats_once in "10":
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", floats_once)
    session = ort.InferenceSession(f"{folder}/a.onnx", options)
    saved = np.load(f"{folder}/a.npz")
    names = [output.name for output in session.get_outputs()]
    for name, out in zip(names, session.run(names, {"ids": saved["ids"]})):
        print(name, floats_once, float(abs(out - saved[name]).max()))
"""


def by_reference(path, example):
    evaluator = ReferenceEvaluator(str(path))
    arrays = [tensor.numpy() for tensor in example.tensors]
    outputs = evaluator.run(None, dict(zip(evaluator.input_names, arrays, strict=True)))
    return [torch.from_numpy(array) for array in outputs]


def test_every_width_runs_with_onnxruntime_and_numpy_alone(every_width, ids, tmp_path, run_without):
    model, weights = every_width
    ids = ids.map(lambda tensor: tensor % 11)
    record = export_onnx(model, weights, ids, tmp_path / "a.onnx")
    assert record.difference <= 1e-4
    said = " ".join(record.notes)
    assert [f"{bits}-bit codes take" in said for bits in range(1, 9)] == [
        bits not in (2, 4, 8) for bits in range(1, 9)
    ]
    onnx.checker.check_model(str(tmp_path / "a.onnx"), full_check=True)
    five = ids.resized(5)
    expected = five.run(dequantized_copy(model, weights))
    assert largest_difference(expected, by_reference(tmp_path / "a.onnx", five)) <= 1e-4
    arrays = {k: v.numpy() for k, v in expected.items()}
    np.savez(tmp_path / "a.npz", ids=five.args[0].numpy(), **arrays)
    found = run_without(f"folder = {str(tmp_path)!r}\n{SERVE}", "clipquant", "lightning", "torch")
    differences = [line.split() for line in found.splitlines()]
    assert [name for name, _, _ in differences] == [*expected, *expected]
    assert [line for line in differences if float(line[2]) > 1e-5] == []


@pytest.mark.parametrize("opset", [18, 21])
def test_a_lower_opset_gives_the_same_outputs(every_width, ids, tmp_path, opset):
    model, weights = every_width
    ids = ids.map(lambda tensor: tensor % 11)
    record = export_onnx(model, weights, ids, tmp_path / "a.onnx", opset=opset)
    assert record.difference <= 1e-5
    assert onnx.load(tmp_path / "a.onnx").opset_import[0].version == opset
    assert f"2-bit codes take {8 if opset < 21 else 4} bits each" in " ".join(record.notes)


@pytest.mark.parametrize(("bits", "kind"), [(8, "INT8"), (4, "UINT4"), (2, "UINT2")])
def test_the_file_is_about_as_small_as_the_artifact(bits, kind, tmp_path):
    model = TwoConvNet()
    weights = quantize_weights(model, Recipe(bits))
    example = Example((torch.randn(1, 1, 28, 28),))
    record = export_onnx(model, weights, example, tmp_path / "a.onnx")
    assert record.bytes == (tmp_path / "a.onnx").stat().st_size
    assert record.bytes <= len(serialize(weights)) + 10_000
    assert record.notes == ()
    graph = onnx.load(tmp_path / "a.onnx").graph
    stored = {i.name: i.data_type for i in graph.initializer}
    assert all(
        stored[f"{name}.q"] == onnx.TensorProto.DataType.Value(kind) for name in weights.tensors
    )
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert [out.name for out in graph.output] == ["output"]


def test_tied_weights_stand_in_the_file_once(zoo, ids, tmp_path):
    export_onnx(zoo, quantize_weights(zoo), ids, tmp_path / "a.onnx")
    initializers = onnx.load(tmp_path / "a.onnx").graph.initializer
    tables = [i for i in initializers if sorted(i.dims) == [16, 20]]
    assert [i.data_type for i in tables] == [onnx.TensorProto.INT8]


@pytest.mark.parametrize(
    ("granularity", "symmetric"),
    [("tensor", True), ("channel", True), ("channel", False), (32, True)],
)
def test_a_matmul_stays_exact_in_a_session_with_default_options(granularity, symmetric, tmp_path):
    import onnxruntime as ort

    layers = {f"{bits}{bias}": nn.Linear(64, 32, bias) for bits in (4, 8) for bias in (0, 1)}
    model = EachAlone(layers)
    weights = quantize_weights(
        model,
        Recipe(
            method="rtn",
            granularity=granularity,
            symmetric=symmetric,
            overrides={f"layers.{bits}?.weight": bits for bits in (4, 8)},
        ),
    )
    x = Example((torch.randn(2, 3, 64),))
    export_onnx(model, weights, x, tmp_path / "a.onnx")
    session = ort.InferenceSession(str(tmp_path / "a.onnx"))
    actual = session.run(None, {session.get_inputs()[0].name: x.args[0].numpy()})
    expected = x.run(dequantized_copy(model, weights))
    assert largest_difference(expected, list(map(torch.from_numpy, actual))) <= 1e-5


class EachAlone(nn.Module):
    """An output of each layer."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers.values()]


class Layers(nn.Module):
    """The layer kinds that the exporter rewrites: attention, recurrent, grouped transposed convolution."""

    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 8, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        h = self.up(x).flatten(2).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.lstm(h)[0]


def test_layers_that_the_exporter_rewrites(tmp_path):
    torch.manual_seed(0)
    model = Layers().eval()
    weights = quantize_weights(model, Recipe(4, granularity=6))
    record = export_onnx(model, weights, Example((torch.randn(2, 4, 3, 3),)), tmp_path / "a.onnx")
    assert record.difference <= 1e-4
    stored = {i.name for i in onnx.load(tmp_path / "a.onnx").graph.initializer}
    assert {f"{name}.q" for name in weights.tensors} <= stored


def test_inputs_as_a_tuple_and_a_dict(tmp_path):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, pair, extra):
            return self.linear(pair[0] + pair[1]["b"]), extra["c"] * 2

    a = torch.randn(3, 4)
    x = Example(((a, {"b": a + 1}),), {"extra": {"c": torch.randn(3, 1)}})
    record = export_onnx(Sum(), quantize_weights(Sum(), Recipe(4)), x, tmp_path / "a.onnx")
    assert len(onnx.load(tmp_path / "a.onnx").graph.input) == 3
    assert record.difference is not None


def test_the_file_holds_no_paths(zoo, ids, tmp_path):
    export_onnx(zoo, quantize_weights(zoo, Recipe(4)), ids, tmp_path / "a.onnx")
    assert b".py" not in (tmp_path / "a.onnx").read_bytes()


def test_what_is_missing_is_named_with_its_extra(monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        "clipquant.export.parts.needs.find_spec",
        lambda name: None if name == "onnxruntime" else find(name),
    )
    layer = nn.Linear(3, 2)
    with pytest.raises(ImportError, match=r"needs onnxruntime.*pip install 'clipquant\[onnx\]'"):
        export_onnx(layer, quantize_weights(layer), Example((torch.ones(1, 3),)), tmp_path / "a")


def test_importing_the_room_imports_no_optional_library(run_without):
    names = ("onnx", "onnxruntime", "onnxscript", "onnx_ir", "compressed_tensors")
    source = str(Path(clipquant.__file__).parents[1])
    run_without(f"sys.path.insert(0, {source!r}); import clipquant.export", *names)


def test_output_names_come_from_keys_and_places():
    x = torch.ones(1)
    assert output_names((x, {"a": x, "b": [x]})) == ["output_0", "output_1_a", "output_1_b_0"]


def test_an_operator_without_an_onnx_form_is_told(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x):
            return torch.special.bessel_j0(self.linear(x))

    with pytest.raises(ExportError, match="Odd has no ONNX form here"):
        export_onnx(
            Odd(), quantize_weights(Odd()), Example((torch.ones(2, 3),)), tmp_path / "a.onnx"
        )
