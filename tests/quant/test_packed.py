import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from clipquant.quant.grid import dequantize
from clipquant.quant.model import quantize_weights
from clipquant.quant.packed import PackedWeight, pack_tensor, packed_copy, unpack_tensor


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose1d(8, 8, 3, padding=1, groups=2)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.decoder = nn.Linear(8, 11, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        h = self.embedding(ids).transpose(1, 2)
        h = self.norm(self.up(self.conv(h))).transpose(1, 2)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        return self.decoder(self.lstm(h)[0])


@pytest.fixture
def layers():
    torch.manual_seed(0)
    return Layers().eval()


IDS = torch.arange(10).reshape(2, 5)


def outputs(model, ids=IDS):
    with torch.no_grad():
        return model(ids)


def dequantized(model, weights):
    copied = copy.deepcopy(model)
    copied.load_state_dict(weights.state_dict())
    return copied


@pytest.mark.parametrize("bits", range(1, 9))
def test_outputs_are_those_of_the_dequantized_model(layers, bits):
    weights = quantize_weights(layers, bits, granularity="channel" if bits % 2 else 3)
    packed = packed_copy(layers, weights)
    expected = outputs(dequantized(layers, weights))
    assert torch.equal(outputs(packed), expected)
    assert torch.equal(outputs(copy.deepcopy(packed)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(packed))), expected)


def test_the_weights_take_their_packed_bytes(layers):
    packed = packed_copy(layers, quantize_weights(layers, 2))
    held = packed.attention.packed_in_proj_weight
    assert held.codes2.nbytes == 24 * 8 // 4
    assert "in_proj_weight" not in packed.attention._parameters


def test_tied_layers_share_their_codes(layers):
    packed = packed_copy(layers, quantize_weights(layers, 4))
    assert packed.decoder.packed_weight is packed.embedding.packed_weight


def test_layers_keep_their_class(layers):
    packed = packed_copy(layers, quantize_weights(layers))
    assert isinstance(packed.conv, nn.Conv1d)
    assert isinstance(packed.lstm, nn.LSTM)


def test_the_state_dict_round_trips(layers):
    weights = quantize_weights(layers, 3)
    packed = packed_copy(layers, weights)
    other = packed_copy(Layers(), quantize_weights(Layers(), 3))
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(outputs(other), outputs(packed))
    with pytest.raises(RuntimeError, match="codes3"):
        packed_copy(Layers(), quantize_weights(Layers(), 4)).load_state_dict(packed.state_dict())


def test_a_change_of_dtype_reaches_the_weight_and_not_the_scales(layers):
    weights = quantize_weights(layers, 4, granularity="tensor")
    packed = packed_copy(layers, weights).to(torch.bfloat16)
    held = packed.conv.packed_weight
    assert packed.conv.weight.dtype == torch.bfloat16
    assert held.scale.dtype == torch.float32
    assert torch.equal(packed.conv.weight, dequantize(weights.tensors["conv.weight"]).bfloat16())
    assert outputs(packed).dtype == torch.bfloat16
    assert packed.to(torch.float32).conv.weight.dtype == torch.float32


def test_a_move_reaches_every_buffer(layers):
    packed = packed_copy(layers, quantize_weights(layers, 4)).to("meta")
    assert {buffer.device.type for buffer in packed.buffers()} == {"meta"}
    assert packed.conv.weight.device.type == "meta"


def test_a_replica_with_buffers_of_its_own_gives_the_same(layers):
    packed = packed_copy(layers, quantize_weights(layers, 4))
    copies = {module: module._replicate_for_data_parallel() for module in packed.modules()}
    for module, replica in copies.items():
        for name, child in module._modules.items():
            replica._modules[name] = copies[child]
        for name, parameter in module._parameters.items():
            replica._parameters[name] = parameter if parameter is None else parameter.clone()
        for name, buffer in module._buffers.items():
            replica._buffers[name] = buffer if buffer is None else buffer.clone()
    assert torch.equal(outputs(copies[packed]), outputs(packed))


@pytest.mark.parametrize("bits", [3, 4])
def test_a_compiled_model_gives_the_same(bits):
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Linear(6, 3)).eval()
    packed = packed_copy(model, quantize_weights(model, bits))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 8)
    assert torch.allclose(outputs(compiled, x), outputs(packed, x), atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_different_widths(symmetric):
    layer = nn.Linear(9, 6)
    tensor = quantize_weights(layer, 8, symmetric=symmetric).tensors["weight"]
    bits = torch.tensor([8, 0, 3, 1, 3, 5], dtype=torch.uint8)
    codes = (tensor.codes % (2 ** bits.long())[:, None]).to(torch.uint8)
    tensor = replace(tensor, codes=codes, bits=bits, levels=None)
    packed = pack_tensor(tensor)
    assert torch.equal(unpack_tensor(packed).codes, codes)
    assert torch.equal(PackedWeight(packed)(), dequantize(tensor))


def test_a_packed_weight_is_read_only(layers):
    packed = packed_copy(layers, quantize_weights(layers, 4))
    with pytest.raises(KeyError, match="weight"):
        packed.conv.weight = nn.Parameter(torch.zeros(8, 8, 3))


def test_backward_reaches_what_lies_before_a_packed_layer(layers):
    packed = packed_copy(layers, quantize_weights(layers, 4))
    x = torch.randn(2, 8, 5, requires_grad=True)
    packed.conv(x).sum().backward()
    assert x.grad.abs().sum() > 0
