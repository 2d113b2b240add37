import pytest
import torch
from torch import nn

from clipquant.artifact import serialize
from clipquant.export import Example, ExportError, export_pt2
from clipquant.export.example import largest_difference
from clipquant.export.onnx import dequantized_copy
from clipquant.quant.codes.grid import Coded, row_levels
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.reference import TwoConvNet

LOAD = """
import torch
program = torch.export.load(f"{folder}/a.pt2")
inputs, expected = torch.load(f"{folder}/a.pt")
out = program.module()(inputs)
assert all(k.dtype in (torch.uint8, torch.float16, torch.float32) for k in program.state_dict.values())
for name in expected:
    print(name, float((out[name] - expected[name]).abs().max()))
"""


def test_every_width_loads_in_a_process_that_has_only_torch(
    every_width, ids, tmp_path, run_without
):
    model, weights = every_width
    ids = ids.map(lambda tensor: tensor % 11)
    export_pt2(model, weights, ids, tmp_path / "a.pt2")
    five = ids.resized(5)
    expected = five.run(dequantized_copy(model, weights))
    torch.save((five.args[0], expected), tmp_path / "a.pt")
    found = run_without(f"folder = {str(tmp_path)!r}\n{LOAD}", "clipquant", "lightning", "numpy")
    differences = dict(line.split() for line in found.splitlines())
    assert differences.keys() == expected.keys()
    assert {name: float(d) for name, d in differences.items() if float(d) > 1e-5} == {}


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_the_file_is_about_as_small_as_the_artifact(bits, tmp_path):
    model = TwoConvNet()
    weights = quantize_weights(model, Recipe(bits))
    example = Example((torch.randn(1, 1, 28, 28),))
    record = export_pt2(model, weights, example, tmp_path / "a.pt2")
    assert record.bytes == (tmp_path / "a.pt2").stat().st_size
    assert record.bytes <= len(serialize(weights)) + 10_000
    assert record.difference <= 1e-5


def test_rows_of_different_widths(zoo, ids, tmp_path):
    from dataclasses import replace

    weights = quantize_weights(zoo, Recipe(4))
    tensors = dict(weights.tensors)
    tensor = tensors["linear.weight"]
    bits = torch.tensor([0, 1, 2, 4] * 4, dtype=torch.uint8)
    codes = (tensor.codes % (2 ** bits.long())[:, None]).to(torch.uint8)
    tensors["linear.weight"] = replace(
        tensor, coded=Coded(codes, replace(tensor.grid, levels=row_levels(bits))), bits=bits
    )
    weights = replace(weights, tensors=tensors)
    assert export_pt2(zoo, weights, ids, tmp_path / "a.pt2").difference == 0.0


def test_the_file_holds_neither_paths_nor_the_example(tmp_path):
    import zipfile

    secret = torch.full((2, 3), 1234.5)
    layer = nn.Linear(3, 2)
    export_pt2(layer, quantize_weights(layer), Example((secret,)), tmp_path / "a.pt2")
    with zipfile.ZipFile(tmp_path / "a.pt2") as archive:
        content = b"".join(archive.read(name) for name in archive.namelist())
    assert b".py" not in content
    assert secret.numpy().tobytes() not in content


def test_a_model_is_not_touched(zoo, ids, tmp_path):
    zoo.train()
    before = {k: v.clone() for k, v in zoo.state_dict().items()}
    export_pt2(zoo, quantize_weights(zoo, Recipe(2)), ids, tmp_path / "a.pt2")
    assert zoo.training
    assert type(zoo.linear) is nn.Linear
    assert all(torch.equal(v, before[k]) for k, v in zoo.state_dict().items())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x) if x.sum() > 0 else self.linear(-x)


def test_a_model_that_cannot_be_captured_is_named_with_the_reason(tmp_path):
    model = Branches()
    with pytest.raises(ExportError, match=r"cannot capture Branches\.forward: .*data-dependent"):
        export_pt2(model, quantize_weights(model), Example((torch.ones(2, 3),)), tmp_path / "a.pt2")
    assert list(tmp_path.iterdir()) == []


class Selects(nn.Module):
    """Its output's shape depends on the values of its input."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x[x[:, 0] > 0])


def test_shapes_that_depend_on_data(tmp_path):
    model, x = Selects(), Example((torch.randn(6, 3),))
    record = export_pt2(model, quantize_weights(model), x, tmp_path / "a.pt2")
    program = torch.export.load(tmp_path / "a.pt2").module()
    y = Example((torch.randn(9, 3),))
    expected = y.run(dequantized_copy(model, quantize_weights(model)))
    assert largest_difference(expected, y.run(program)) <= 1e-5
    assert record.difference <= 1e-5


class Fixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x).reshape(4, 2)


def test_a_batch_size_that_the_model_fixes_is_said(tmp_path):
    model = Fixed()
    x = Example((torch.randn(4, 3),))
    record = export_pt2(model, quantize_weights(model), x, tmp_path / "a.pt2")
    assert "input shapes are fixed at [(4, 3)]" in record.notes[0]
    assert record.difference == 0.0


def test_one_layer_under_two_names(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 8)
            self.back = self.front = nn.Linear(8, 8)

        def forward(self, x):
            return self.front(self.back(self.first(x)))

    model, x = Shared(), Example((torch.randn(4, 8),))
    record = export_pt2(model, quantize_weights(model, Recipe(4)), x, tmp_path / "a.pt2")
    assert record.difference <= 1e-6
