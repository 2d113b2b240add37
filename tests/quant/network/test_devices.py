"""Whatever device a model lies on: no tensor is made on another, no memory is no end, few values are read out."""

from __future__ import annotations

import copy
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from clipquant import quantize
from clipquant.errors import ArgumentError
from clipquant.quant.codes.ranges import mse_grid
from clipquant.quant.codes.spec import QuantSpec
from clipquant.quant.methods import METHODS, AdaRound, Distill, gptq, layerwise
from clipquant.quant.methods.base import Problem
from clipquant.quant.network.calibration import Calibration
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

QUICK = {"adaround": AdaRound(steps=2), "distill": Distill(steps=2)}
NAMED = [(name, QUICK.get(name, name)) for name in METHODS]


class Everything(nn.Module):
    """A lookup, a grouped convolution, BatchNorm, attention, a recurrent layer, a wide layer of few samples."""

    def __init__(self):
        super().__init__()
        self.lookup = nn.Embedding(20, 48)
        self.conv = nn.Conv1d(48, 48, 3, groups=2)
        self.norm = nn.BatchNorm1d(48)
        self.attention = nn.MultiheadAttention(48, 2, batch_first=True)
        self.cell = nn.LSTM(48, 44, batch_first=True)
        self.wide = nn.Linear(528, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, ids):
        x = self.norm(self.conv(self.lookup(ids).transpose(1, 2))).transpose(1, 2)
        x = self.cell(self.attention(x, x, x)[0])[0]
        return self.head(torch.relu(self.wide(x.flatten(1))))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Everything().eval()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(1)
    return [torch.randint(0, 20, (8, 14)) for _ in range(4)]


@contextmanager
def elsewhere():
    """Make every tensor without a device one without values, and forbid to fetch any to the host."""
    cpu = torch.Tensor.cpu

    def refused(*_args, **_kwargs):
        raise AssertionError("a tensor was fetched to the host")

    torch.set_default_device("meta")
    torch.Tensor.cpu = refused
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.Tensor.cpu = cpu


ASKED = [
    *((name, method, 2, None) for name, method in NAMED),
    *((name, name, 4, granularity) for name in ("mse", "gptq") for granularity in ("tensor", 16)),
    *((name, name, 8, None) for name in ("auto", "rtn", "hqq")),
]


@pytest.mark.parametrize(("name", "method", "bits", "granularity"), ASKED)
def test_no_tensor_is_made_on_another_device(name, method, bits, granularity, net, data):
    recipe, batches = Recipe(bits, granularity=granularity, method=method), data[:2]
    plain = quantize_weights(net, recipe, Calibration(batches))
    with elsewhere():
        found = quantize_weights(net, recipe, Calibration(batches))
    for key, tensor in plain.tensors.items():
        assert torch.equal(found.tensors[key].codes, tensor.codes), key


class Reads(TorchDispatchMode):
    """Counts the values read out of tensors."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


def reads_of(work):
    with Reads() as reads:
        work()
    return reads.count


def test_values_read_out_do_not_grow_with_batches_or_columns():
    torch.manual_seed(0)

    def reads(columns, batches, bits=4):
        net = nn.Sequential(nn.Linear(columns, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
        inputs = [torch.randn(6, columns) for _ in range(batches)]
        recipe = Recipe(bits, granularity="channel", method="gptq", symmetric=False)
        return reads_of(lambda: solved(net, recipe, inputs))

    def solved(net, recipe, inputs):
        targets = recipe.select(net).targets
        return METHODS["gptq"].solve(
            Problem(net, targets, recipe.specs(targets), Calibration(inputs))
        )

    few = reads(32, 8)
    sweeps = 2 * 6  # of the descent, which ends when it gains little
    assert abs(reads(32, 16) - few) <= sweeps
    assert abs(reads(300, 8) - few) <= sweeps
    assert few <= 2 * 15 + sweeps


def test_ranges_read_out_a_constant_number_of_values():
    torch.manual_seed(0)
    counts = {
        size: reads_of(lambda size=size: mse_grid(torch.randn(size, size), QuantSpec(4)))
        for size in (8, 300)
    }
    assert counts[8] == counts[300] <= 3


def test_a_layer_without_room_is_computed_on_the_cpu_and_says_so(net, monkeypatch):
    wanted = quantize_weights(net, Recipe(4, method="mse"))
    tight = {"left": 1}

    def short(code):
        def tried(*args):
            if tight["left"]:
                tight["left"] -= 1
                raise torch.OutOfMemoryError("no room")
            return code(*args)

        return tried

    monkeypatch.setattr("clipquant.quant.methods.mse.mse_grid", short(mse_grid))
    found = quantize_weights(net, Recipe(4, method="mse"))
    said = [note for note in found.notes.values() if "computed on the CPU" in note]
    assert len(said) == 1
    assert all(torch.equal(t.codes, wanted.tensors[k].codes) for k, t in found.tensors.items())


@pytest.mark.parametrize("place", ["observe", "walk"])
def test_gptq_without_room_goes_on_on_the_cpu(place, net, data, monkeypatch):
    data = data[:2]
    wanted = quantize_weights(net, Recipe(4, method="gptq"), Calibration(data))
    module, name = (layerwise, "observe") if place == "observe" else (gptq, "plan_walk")
    tight, own = {"left": 2 if place == "observe" else 1}, getattr(module, name)

    def tried(*args, **kwargs):
        if tight["left"]:
            tight["left"] -= 1
            raise torch.OutOfMemoryError("no room")
        return own(*args, **kwargs)

    monkeypatch.setattr(module, name, tried)
    found = quantize_weights(net, Recipe(4, method="gptq"), Calibration(data))
    assert any("computed on the CPU" in note for note in found.notes.values())
    assert all(torch.equal(t.codes, wanted.tensors[k].codes) for k, t in found.tensors.items())


def test_a_device_is_taken_and_the_model_stays_where_it_is(net, data):
    before = copy.deepcopy(net.state_dict())
    made = quantize(net, 4, data=data, device="cpu", progress=False)
    plain = quantize(net, 4, data=data, progress=False)
    for key, tensor in plain.weights.tensors.items():
        assert torch.equal(made.weights.tensors[key].codes, tensor.codes)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    for device in ("meta", "nowhere", "cuda:77"):
        with pytest.raises(ArgumentError, match="device must"):
            quantize(net, 4, device=device, progress=False)
    with pytest.raises(ArgumentError, match="where the model lies"):
        quantize(net, "auto", max_size=0.5, data=data, device="cpu", progress=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("method", ["rtn", "mse", "hqq", "gptq"])
def test_a_gpu_gives_nearly_the_cpus_codes(method, net, data):
    one = quantize(net, 4, method=method, data=data, device="cuda", progress=False)
    other = quantize(net, 4, method=method, data=data, progress=False)
    for key, tensor in other.weights.tensors.items():
        found = one.weights.tensors[key]
        assert found.codes.device == tensor.codes.device
        assert (found.codes != tensor.codes).float().mean() < 0.02
