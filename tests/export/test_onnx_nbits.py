"""ONNX whose linear layers are MatMulNBits: onnxruntime against the dequantized torch model."""

from __future__ import annotations

import warnings

import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from clipquant.export import Example, ExportError, Judgement, Subject, as_format
from clipquant.export.example import largest_difference
from clipquant.export.onnx import Onnx
from clipquant.export.onnx_nbits import OnnxNbits
from clipquant.export.parts.blocks import FLOAT, INT8
from clipquant.export.parts.onnx_graph import dequantized_copy
from clipquant.export.parts.sessions import feeds, open_any
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

FORMAT = OnnxNbits(Onnx(), least=0, batches=(2,))
GRIDS = [
    (1, None, "rtn", False), (2, None, "rtn", True), (2, 16, "rtn", False), (3, "tensor", "rtn", False),
    (4, None, "rtn", False), (4, 32, "hqq", False), (6, 256, "mse", False), (8, 64, "rtn", True),
]  # fmt: skip


class Mixed(nn.Module):
    """A convolution, two linear layers on a sequence, a tied pair, an attention."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(30, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 200), nn.Linear(200, 64, bias=False)
        self.out = nn.Linear(64, 30, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids):
        x = self.conv(self.words(ids).mT).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.out(x + self.down(torch.relu(self.up(x))))


def written(model, x, recipe, path, chosen=FORMAT, **known):
    weights = quantize_weights(model, recipe)
    example = Example((x,))
    record = chosen.write(Subject(weights, model, example, **known), path)
    session = open_any(path)
    plain = dequantized_copy(model, weights)

    def apart(call):
        actual = session.run(None, feeds(session, call))
        return largest_difference(call.run(plain), [torch.from_numpy(a) for a in actual])

    return record, apart, onnx.load(path)


def kinds(file):
    return [node.op_type for node in file.graph.node]


def at_level(level, tmp_path, recipe, model, x):
    """Return what a file is apart from torch, its products computed at one accuracy level."""
    judge = (lambda _: Judgement(0.0, {})) if level == INT8 else _worse_first()
    return written(model, x, recipe, tmp_path / "a.onnx", judge=judge)


def _worse_first():
    drops = iter([1.0, 0.0])
    return lambda _: Judgement(next(drops), {"acc": 0.5})


@pytest.mark.parametrize(("bits", "granularity", "method", "symmetric"), GRIDS)
def test_every_grid_is_exact_with_float_activations(bits, granularity, method, symmetric, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 24), nn.ReLU(), nn.Linear(24, 5, bias=False)).eval()
    model[0].weight.data[3] = 0.25  # a constant row has a grid of its own
    recipe = Recipe(bits, None, symmetric, granularity, method)
    x = torch.randn(3, 300) + 1
    record, apart, file = at_level(FLOAT, tmp_path, recipe, model, x)
    assert kinds(file).count("MatMulNBits") == 2
    assert record.difference <= 2e-5
    assert apart(Example((torch.randn(7, 300),))) <= 2e-5
    assert any("1 was lost" in note for note in record.notes)
    assert record.metrics == {"acc": 0.5}


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_int8_activations_stay_near(bits, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 64), nn.ReLU(), nn.Linear(64, 5)).eval()
    x = torch.randn(16, 300)
    record, _, file = at_level(INT8, tmp_path, Recipe(bits), model, x)
    levels = [a.i for n in file.graph.node for a in n.attribute if a.name == "accuracy_level"]
    assert levels == [INT8, INT8]
    assert record.difference <= 0.02 * float(model(x).detach().abs().max())
    assert [timing.batch for timing in record.timings] == [2]


def test_codes_are_the_artifacts_own(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 8, bias=False)).eval()
    weights = quantize_weights(model, Recipe(4, granularity=32, method="rtn"))
    FORMAT.write(Subject(weights, model, Example((torch.randn(2, 64),))), tmp_path / "a.onnx")
    held = {
        i.name: numpy_helper.to_array(i) for i in onnx.load(tmp_path / "a.onnx").graph.initializer
    }
    (packed,) = (a for name, a in held.items() if name.endswith("codes"))
    packed = torch.from_numpy(packed.copy())
    codes = torch.stack([packed & 15, packed >> 4], -1).reshape(8, 64)
    assert torch.equal(codes, weights.tensors["0.weight"].codes)


def test_a_layer_that_runs_many_times_is_held_once(tmp_path):
    class Again(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            for _ in range(3):
                x = self.layer(x)
            return x

    torch.manual_seed(0)
    record, apart, file = written(
        Again().eval(), torch.randn(2, 64), Recipe(4, granularity=32), tmp_path / "a.onnx"
    )
    assert kinds(file).count("MatMulNBits") == 3
    assert sum(i.name.endswith("codes") for i in file.graph.initializer) == 1
    names = [i.name for i in file.graph.initializer]
    assert len(set(names)) == len(names)
    assert record.difference <= 0.02


def test_layers_that_have_no_such_form_stay_as_in_onnx_and_are_named(tmp_path):
    torch.manual_seed(0)
    model, ids = Mixed().eval(), torch.randint(30, (2, 9))
    record, apart, file = written(model, ids, Recipe(4), tmp_path / "a.onnx")
    found = kinds(file)
    assert found.count("MatMulNBits") >= 3
    assert "DequantizeLinear" in found
    said = " ".join(record.notes)
    assert "as in onnx: conv.weight (not multiplied as a whole)" in said
    five = Example((torch.randint(30, (5, 9)),))
    assert apart(five) <= 0.02 * float(model(*five.args).detach().abs().max())


@pytest.mark.parametrize(
    ("recipe", "why"),
    [
        (Recipe(4, granularity=48), "groups of 48"),
        (Recipe(4, granularity=8), "groups of 8"),
        (Recipe(4), "fewer than 65,536 weights"),
    ],
)
def test_a_file_without_any_product_says_why(recipe, why, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(192, 8)).eval()
    chosen = OnnxNbits(Onnx()) if "fewer" in why else FORMAT
    record, apart, file = written(model, torch.randn(2, 192), recipe, tmp_path / "a.onnx", chosen)
    assert "MatMulNBits" not in kinds(file)
    assert why in " ".join(record.notes)
    assert apart(Example((torch.randn(4, 192),))) <= 1e-5


def test_wide_layers_are_quicker_and_smaller_than_float(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        record, _, _ = written(
            model, torch.randn(2, 1024), Recipe(4), tmp_path / "a.onnx", as_format("onnx-nbits")
        )
    assert record.bytes <= 0.16 * 4 * 1024**2
    by_batch = {timing.batch: timing.ratio for timing in record.timings}
    assert sorted(by_batch) == [1, 8, 64]
    assert by_batch[1] <= 0.7


def test_what_the_base_refuses_is_refused(tmp_path):
    weights = quantize_weights(nn.Linear(8, 8), Recipe(4))
    with pytest.raises(ExportError, match="no example input"):
        FORMAT.write(Subject(weights, nn.Linear(8, 8)), tmp_path / "a.onnx")
