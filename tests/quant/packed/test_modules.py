import copy
import pickle
from dataclasses import replace

import pytest
import torch
from torch import nn

from clipquant.quant.codes.grid import Coded, row_levels
from clipquant.quant.codes.pack import pack_tensor, unpack_tensor
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.packed.modules import packed_copy
from clipquant.quant.packed.weight import PackedWeight
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


def with_rows(tensor, codes, bits):
    """Return the tensor with other codes, each row of a width of its own."""
    grid = replace(tensor.grid, levels=row_levels(bits))
    return replace(tensor, coded=Coded(codes, grid), bits=bits)


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
    weights = quantize_weights(layers, Recipe(bits, granularity="channel" if bits % 2 else 3))
    packed = packed_copy(layers, weights)
    expected = outputs(dequantized(layers, weights))
    assert torch.equal(outputs(packed), expected)
    assert torch.equal(outputs(copy.deepcopy(packed)), expected)
    assert torch.equal(outputs(pickle.loads(pickle.dumps(packed))), expected)


def test_the_weights_take_their_packed_bytes(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(2)))
    held = packed.attention.packed_in_proj_weight
    assert held.codes2.nbytes == 24 * 8 // 4
    assert "in_proj_weight" not in packed.attention._parameters


def test_tied_layers_share_their_codes(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(4)))
    assert packed.decoder.packed_weight is packed.embedding.packed_weight


def test_layers_keep_their_class(layers):
    packed = packed_copy(layers, quantize_weights(layers))
    assert isinstance(packed.conv, nn.Conv1d)
    assert isinstance(packed.lstm, nn.LSTM)


def test_the_state_dict_round_trips(layers):
    weights = quantize_weights(layers, Recipe(3))
    packed = packed_copy(layers, weights)
    other = packed_copy(Layers(), quantize_weights(Layers(), Recipe(3)))
    other.load_state_dict(packed.state_dict(), strict=True)
    assert torch.equal(outputs(other), outputs(packed))
    with pytest.raises(RuntimeError, match="codes3"):
        packed_copy(Layers(), quantize_weights(Layers(), Recipe(4))).load_state_dict(
            packed.state_dict()
        )


def test_a_change_of_dtype_reaches_the_weight_and_not_the_scales(layers):
    weights = quantize_weights(layers, Recipe(4, granularity="tensor"))
    packed = packed_copy(layers, weights).to(torch.bfloat16)
    held = packed.conv.packed_weight
    assert packed.conv.weight.dtype == torch.bfloat16
    assert held.scale.dtype == torch.float32
    assert torch.equal(packed.conv.weight, dequantize(weights.tensors["conv.weight"]).bfloat16())
    assert outputs(packed).dtype == torch.bfloat16
    assert packed.to(torch.float32).conv.weight.dtype == torch.float32


def test_a_move_reaches_every_buffer(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(4))).to("meta")
    assert {buffer.device.type for buffer in packed.buffers()} == {"meta"}
    assert packed.conv.weight.device.type == "meta"


def test_a_replica_with_buffers_of_its_own_gives_the_same(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(4)))
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
    packed = packed_copy(model, quantize_weights(model, Recipe(bits)))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 4, 8)
    assert torch.allclose(outputs(compiled, x), outputs(packed, x), atol=1e-6)


@pytest.mark.parametrize("symmetric", [False, True])
def test_rows_of_different_widths(symmetric):
    layer = nn.Linear(9, 6)
    tensor = quantize_weights(layer, Recipe(8, symmetric=symmetric)).tensors["weight"]
    bits = torch.tensor([8, 0, 3, 1, 3, 5], dtype=torch.uint8)
    codes = (tensor.codes % (2 ** bits.long())[:, None]).to(torch.uint8)
    tensor = with_rows(tensor, codes, bits)
    packed = pack_tensor(tensor)
    assert torch.equal(unpack_tensor(packed).codes, codes)
    assert torch.equal(PackedWeight(packed)(), dequantize(tensor))


def test_a_packed_weight_is_read_only(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(4)))
    with pytest.raises(KeyError, match="weight"):
        packed.conv.weight = nn.Parameter(torch.zeros(8, 8, 3))


def test_backward_reaches_what_lies_before_a_packed_layer(layers):
    packed = packed_copy(layers, quantize_weights(layers, Recipe(4)))
    x = torch.randn(2, 8, 5, requires_grad=True)
    packed.conv(x).sum().backward()
    assert x.grad.abs().sum() > 0


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of eight rows, so that small layers are run in several."""
    monkeypatch.setattr("clipquant.quant.packed.weight.BLOCK", 1)


BAG = {"input": torch.tensor([3, 0, 3, 18, 7]), "offsets": torch.tensor([0, 2, 2])}
BLOCKWISE = {
    "linear": (nn.Linear(5, 19), (torch.randn(2, 3, 5),)),
    "linear without a bias": (nn.Linear(8, 16, bias=False), (torch.randn(8),)),
    "conv1d": (nn.Conv1d(3, 17, 3, padding=1, padding_mode="circular"), (torch.randn(2, 3, 6),)),
    "conv2d": (nn.Conv2d(2, 20, (2, 3), stride=2), (torch.randn(2, 5, 6),)),
    "conv3d": (nn.Conv3d(2, 9, 2, bias=False), (torch.randn(1, 2, 3, 3, 3),)),
    "grouped conv": (nn.Conv1d(4, 20, 3, groups=2), (torch.randn(2, 4, 6),)),
    "up1d": (nn.ConvTranspose1d(3, 17, 3, stride=2), (torch.randn(2, 3, 4), [10])),
    "up2d": (nn.ConvTranspose2d(3, 10, 3, padding=1), (torch.randn(3, 4, 4),)),
    "grouped up": (nn.ConvTranspose1d(4, 20, 3, groups=2), (torch.randn(2, 4, 4),)),
    "embedding": (nn.Embedding(19, 5, padding_idx=3), (torch.tensor([[18, 0], [3, 3]]),)),
    "embedding of norm 1": (nn.Embedding(19, 8, max_norm=1.0), (torch.tensor([18, 0, 0]),)),
    "no ids": (nn.Embedding(19, 8), (torch.zeros(0, 2, dtype=torch.long),)),
    "bag": (nn.EmbeddingBag(19, 5, mode="sum"), tuple(BAG.values())),
    "padded bag": (nn.EmbeddingBag(19, 8, padding_idx=3), tuple(BAG.values())),
    "bag of maxima": (nn.EmbeddingBag(19, 3, mode="max"), (BAG["input"].reshape(1, -1),)),
}


def mixed_rows(tensor):
    """The weight with 0 to 8 bits a row."""
    bits = torch.arange(tensor.layout.rows).mul(5).remainder(9).to(torch.uint8)
    codes = (tensor.codes % (2 ** bits.long())[:, None]).to(torch.uint8)
    return with_rows(tensor, codes, bits)


@pytest.mark.parametrize("bits", [*range(1, 9), "rows"])
@pytest.mark.parametrize("kind", BLOCKWISE)
def test_a_layer_run_in_blocks_gives_what_the_dequantized_layer_gives(kind, bits, small_blocks):
    layer, inputs = BLOCKWISE[kind]
    layer = copy.deepcopy(layer).eval()
    for granularity in ("tensor", "channel", 3):
        weights = quantize_weights(
            layer, Recipe(8 if bits == "rows" else bits, granularity=granularity)
        )
        if bits == "rows" and granularity != "tensor":
            weights = replace(weights, tensors={"weight": mixed_rows(weights.tensors["weight"])})
        with torch.no_grad():
            expected = dequantized(layer, weights)(*inputs)
            packed = packed_copy(layer, weights)
            actual = packed(*inputs)
        if "conv" in kind or "up" in kind or "linear" in kind:
            assert torch.allclose(actual, expected, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(actual, expected)
        assert torch.equal(packed.weight, dequantize(weights.tensors["weight"]))


def test_a_layer_of_several_blocks_is_never_dequantized_whole(small_blocks, monkeypatch):
    asked = []
    monkeypatch.setattr(PackedWeight, "forward", lambda self: asked.append(self))
    for kind, (layer, inputs) in BLOCKWISE.items():
        if "grouped" not in kind:
            packed_copy(layer, quantize_weights(layer, Recipe(4)))(*inputs)
    assert asked == []


def test_gradients_pass_through_blocks(small_blocks):
    layer, (x,) = BLOCKWISE["linear"]
    weights = quantize_weights(layer, Recipe(4))
    found = []
    for model in (dequantized(layer, weights), packed_copy(layer, weights)):
        given = x.clone().requires_grad_()
        model(given).square().sum().backward()
        found.append((given.grad, model.bias.grad))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("index", [-1, 19])
def test_an_index_outside_the_table_is_refused(index, small_blocks):
    packed = packed_copy(nn.Embedding(19, 5), quantize_weights(nn.Embedding(19, 5), Recipe(3)))
    with pytest.raises(IndexError, match=f"0 to 18; got .*{index}"):
        packed(torch.tensor([0, index]))


def test_a_subclass_with_a_forward_of_its_own_keeps_it(small_blocks):
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer = Twice(5, 19)
    weights = quantize_weights(layer, Recipe(4))
    x = torch.randn(2, 5)
    assert torch.equal(
        outputs(packed_copy(layer, weights), x), outputs(dequantized(layer, weights), x)
    )


def test_a_compiled_layer_of_several_blocks_holds_its_weight_whole_in_the_graph(small_blocks):
    model = nn.Sequential(nn.Embedding(19, 6), nn.Linear(6, 33)).eval()
    packed = packed_copy(model, quantize_weights(model, Recipe(4)))
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[1, 18]])
    assert torch.allclose(outputs(compiled, ids), outputs(packed, ids), atol=1e-6)
