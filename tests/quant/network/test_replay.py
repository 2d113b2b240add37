"""Passes of what is settled: as many calls of every layer however deep, the codes of whole passes, proof or none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from clipquant.quant.methods import layerwise
from clipquant.quant.network.calibration import Calibration, call_model
from clipquant.quant.network.layers import select
from clipquant.quant.network.replay import Replay, parts_of
from clipquant.quant.network.watches import plain_attention
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

WIDTH = 8


class Block(nn.Module):
    """A layer of a transformer, which counts its calls."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.wide, self.back = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.back(F.gelu(self.wide(self.norms[1](x))))


class Transformer(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


class Skips(nn.Module):
    """Early outputs read late, outputs changed in place behind a layer, two outputs of a part, a tied layer."""

    def __init__(self):
        super().__init__()
        self.down = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)])
        self.up = nn.ModuleList([nn.Conv1d(WIDTH, WIDTH, 3, padding=1) for _ in range(3)])
        self.two = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x):
        x, kept = x.transpose(1, 2), []
        for layer in self.down:
            x = F.relu_(layer(x))
            kept.append(x * 2)
        for layer in self.up:
            x = layer(x).add_(kept.pop())
        states, last = self.two(x.transpose(1, 2))
        return self.head(states.mean(1) + last[0])


class Shared(nn.Module):
    """A layer that is run several times between others."""

    def __init__(self):
        super().__init__()
        self.first, self.again, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        x = self.first(x)
        for _ in range(3):
            x = x + torch.tanh(self.again(x))
        return self.last(x)


class Router(nn.Module):
    """Goes one of two ways by its own numbers."""

    def __init__(self):
        super().__init__()
        self.ways = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])

    def forward(self, x):
        x = self.ways[0](x)
        x = self.ways[1](x) if float(x.mean()) > 0 else self.ways[2](x)
        return self.ways[3](x)


def data(count=5):
    torch.manual_seed(1)
    return [torch.randn(4, 6, WIDTH) for _ in range(count)]


def quantized(net, batches, monkeypatch, replayed, forward=call_model):
    with monkeypatch.context() as patch:
        patch.setattr(layerwise, "MOST_PASSES", 10**6)
        if not replayed:
            patch.setattr(layerwise, "parts_of", lambda *_: Replay([], {}))
        return quantize_weights(net, Recipe(3, method="gptq"), Calibration(batches, forward))


def replay_of(net, batches=None):
    steps = [[target.name] for target in select(net).targets]
    return parts_of(net, Calibration(batches or data()), steps)


@pytest.mark.parametrize("make", [lambda: Transformer(3), Skips, Shared, Router])
def test_codes_are_those_of_whole_passes(make, monkeypatch):
    torch.manual_seed(0)
    net = make().eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    one, other = (quantized(net, data(), monkeypatch, replayed) for replayed in (True, False))
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.codes, other.tensors[name].codes), name
        assert torch.equal(tensor.scale, other.tensors[name].scale), name
    assert all(torch.equal(one.floats[key], other.floats[key]) for key in one.floats)
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    assert not any("forward" in vars(part) for part in net.modules())


@pytest.mark.parametrize("depth", [12, 48])
def test_a_layer_is_called_as_often_however_deep_the_network_is(depth, monkeypatch):
    torch.manual_seed(0)
    net = Transformer(depth).eval()
    quantized(net, data(1), monkeypatch, replayed=True)
    # each of 4 weights takes a pass of both networks, and one more tells the outputs; to find the order
    # of use takes one call, the proof two, to judge the outcome two
    assert {block.calls for block in net.blocks} == {2 * 5 + 1 + 2 + 2}


def test_outputs_that_nobody_reads_any_more_are_given_up():
    torch.manual_seed(0)
    net, batches = Transformer(6).eval(), data(3)
    replay = replay_of(net, batches)
    seen = []

    def forward(model, batch):
        output = call_model(model, batch)
        seen.append(sum(k.nbytes for k in replay.kept.get((0, 0), {}).values()))
        return output

    for number in range(6):
        with torch.no_grad(), plain_attention(), replay.passing((0, 0), number):
            forward(net, batches[0])
        replay.settle_([t.name for t in select(net).targets if f"blocks.{number}." in t.name])
    held = replay.kept[0, 0]
    assert len(held) == 5
    assert sum(made.nbytes for made in held.values()) == batches[0].nbytes


def test_what_finds_no_room_is_run_again(monkeypatch):
    torch.manual_seed(0)
    net = Transformer(3).eval()
    monkeypatch.setattr("clipquant.quant.network.replay.MOST_BYTES", 3 * data()[0].nbytes)
    few = lambda *args: parts_of(*args, most=3 * data()[0].nbytes)  # noqa: E731
    monkeypatch.setattr(layerwise, "parts_of", few)
    one = quantized(net, data(), monkeypatch, replayed=True)
    other = quantized(net, data(), monkeypatch, replayed=False)
    assert all(torch.equal(t.codes, other.tensors[n].codes) for n, t in one.tensors.items())


class Counts(nn.Module):
    """Gives something else at every call."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.calls = 0

    def forward(self, x):
        for layer in self.layers:
            self.calls += 1
            x = layer(x) + 0.01 * self.calls
        return x


class Hidden(nn.Module):
    """Hands numbers on aside from outputs, where no part's output shows them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH)) for _ in range(3)])
        self.aside = None
        self.layers[0].register_forward_pre_hook(self._keep)

    def _keep(self, _module, args):
        self.aside = args[0].mean()

    def forward(self, x):
        self.layers[0][0].weight.data.mul_(1.0)
        for layer in self.layers:
            x = layer(x) + torch.as_tensor(float(self.aside))
        return x


def test_what_is_not_the_same_again_is_not_replayed():
    torch.manual_seed(0)
    assert replay_of(Counts().eval()).parts == []
    compiled = Transformer(2).eval()
    compiled.blocks[0]._compiled_call_impl = compiled.blocks[0]._call_impl
    assert replay_of(compiled).parts == []
    assert len(replay_of(Transformer(2).eval()).parts) == 3


def test_values_read_out_keep_what_they_came_from(monkeypatch):
    torch.manual_seed(0)
    net = Router().eval()
    parts = replay_of(net).parts
    assert len(parts) == 3  # one way is not gone
    assert -1 in parts[0].readers
    net = Hidden().eval()
    one, other = (quantized(net, data(), monkeypatch, replayed) for replayed in (True, False))
    assert all(torch.equal(t.codes, other.tensors[n].codes) for n, t in one.tensors.items())


def test_a_network_that_will_not_take_zeros_is_run_whole(monkeypatch):
    class Checked(Transformer):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
                if not x.abs().sum() > 0:
                    raise ValueError("zeros")
            return self.head(x.mean(1))

    torch.manual_seed(0)
    net = Checked(3).eval()
    one, other = (quantized(net, data(), monkeypatch, replayed) for replayed in (True, False))
    assert all(torch.equal(t.codes, other.tensors[n].codes) for n, t in one.tensors.items())


def test_a_fault_of_the_users_code_is_told_as_ever():
    net = Transformer(2).eval()

    def forward(model, batch):
        if batch.shape[0] == 3:
            raise RuntimeError("batch of three")
        return model(batch)

    with pytest.raises(RuntimeError, match="batch of three"):
        quantize_weights(
            net, Recipe(3, method="gptq"), Calibration([*data(2), data(1)[0][:3]], forward)
        )
