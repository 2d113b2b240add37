"""Layers beyond Linear and convolutions through quantizing, the file, both ways of loading, and the exports."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from clipquant import load_quantized, quantize
from clipquant.export import FORMATS, Example, Subject
from clipquant.export.example import largest_difference, largest_size


class Experts(nn.Module):
    """Matrices stacked as torch.bmm takes them, and a product by einsum."""

    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 8, 12) / 3)
        self.down = nn.Parameter(torch.randn(3, 12, 8) / 3)

    def forward(self, x):
        return torch.einsum("enh,eho->eno", torch.bmm(x, self.up).relu(), self.down)


class Mixture(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3)
        self.experts = Experts()

    def forward(self, x):
        each = self.experts(x[None].expand(3, -1, -1))
        return (each * self.gate(x).softmax(-1).T[..., None]).sum(0)


class Pairs(nn.Module):
    def __init__(self):
        super().__init__()
        self.pairs = nn.Bilinear(6, 5, 7)
        self.out = nn.Linear(7, 2)

    def forward(self, x, y):
        return self.out(self.pairs(x, y))


class Rebuilt(nn.Module):
    """A recurrent layer, one of whose weights is rebuilt before each forward."""

    def __init__(self, rebuild):
        super().__init__()
        self.cells = nn.LSTM(6, 6, batch_first=True)
        rebuild(self.cells)
        self.out = nn.Linear(6, 2)

    def forward(self, x):
        return self.out(self.cells(x)[0])


def pruned():
    return Rebuilt(lambda cells: prune.l1_unstructured(cells, "weight_hh_l0", 0.5))


def normed():
    return Rebuilt(lambda cells: nn.utils.weight_norm(cells, "weight_hh_l0"))


CELLS = {"cells.weight_ih_l0", "out.weight"}
KINDS = {
    "experts": (Mixture, [(4, 8)], {"gate.weight", "experts.up", "experts.down"}, ("pt2", "onnx")),
    "bilinear": (Pairs, [(4, 6), (4, 5)], {"pairs.weight", "out.weight"}, ("onnx",)),
    "pruned LSTM": (pruned, [(4, 5, 6)], CELLS, ("onnx",)),
    "weight-normed LSTM": (normed, [(4, 5, 6)], CELLS, ("pt2",)),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_layer_passes_through_everything(kind, tmp_path):
    make, shapes, names, formats = KINDS[kind]
    torch.manual_seed(0)
    model, example = make().eval(), Example(tuple(torch.randn(shape) for shape in shapes))
    exact = example.run(model)
    for data in (None, [example.args] * 2):
        made = quantize(model, 8, data=data, progress=False)
        assert made.weights.tensors.keys() == names
        path = made.save(tmp_path / "a.safetensors")
        loaded = load_quantized(path, make().eval())
        outputs = example.run(loaded)
        assert largest_difference(exact, outputs) <= 0.03 * largest_size(exact)
        packed = load_quantized(path, make().eval(), packed=True)
        for one in (packed, copy.deepcopy(packed)) if "LSTM" not in kind else (packed,):
            assert torch.allclose(example.run(one), outputs, atol=1e-6)
    for name in formats:
        subject = Subject(made.weights, loaded, example)
        record = FORMATS[name].write(subject, tmp_path / FORMATS[name].file)
        assert record.difference <= 1e-5


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_experts_are_quantized_each_by_itself(granularity):
    """An expert a thousand times smaller than another keeps its own scales."""
    model = Mixture()
    with torch.no_grad():
        model.experts.up[1] *= 1e-3
    made = quantize(model, 8, method="rtn", granularity=granularity, progress=False).weights
    tensor = made.tensors["experts.up"]
    assert tensor.layout.rows == 3 * 12
    kept = made.state_dict()["experts.up"][1]
    apart = (kept - model.experts.up[1]).norm() / model.experts.up[1].norm()
    assert (apart <= 0.01) == (granularity != "tensor")
