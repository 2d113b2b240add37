import json

import pytest
import safetensors.torch
import torch
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from torch import nn

from clipquant import quantize
from clipquant.artifact import read_artifact
from clipquant.export import ExportError
from clipquant.export.compressed_tensors import to_pack_quantized
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3)
        self.one = nn.Linear(36, 16)
        self.two = nn.Linear(64, 5, bias=False)


def read_back(folder, module):
    """The weight of a module as compressed-tensors reads it."""
    state = safetensors.torch.load_file(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    groups = QuantizationConfig.model_validate(config).config_groups.values()
    scheme = next(QuantizationScheme.model_validate(g) for g in groups if module in g.targets)
    own = {k.removeprefix(f"{module}."): v for k, v in state.items() if k.startswith(f"{module}.")}
    return PackedQuantizationCompressor.decompress(own, scheme)["weight"]


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_the_package_reads_back_the_weights(bits, granularity, tmp_path):
    weights = quantize_weights(Mixed(), Recipe(bits, symmetric=True, granularity=granularity))
    written = to_pack_quantized(weights, tmp_path)
    assert written.packed == ("one", "two")
    for module in written.packed:
        expected = dequantize(weights.tensors[f"{module}.weight"])
        assert torch.allclose(read_back(tmp_path, module), expected, rtol=1e-6, atol=0)


def test_integer_zero_points_are_read_back(tmp_path):
    from dataclasses import replace

    weights = quantize_weights(Mixed(), Recipe(4, granularity=4))
    tensors = {}
    for name, tensor in weights.tensors.items():
        grid = replace(tensor.grid, zero=tensor.zero.round().clamp(0, 15))
        tensors[name] = replace(tensor, coded=replace(tensor.coded, grid=grid))
    weights = replace(weights, tensors=tensors)
    to_pack_quantized(weights, tmp_path)
    expected = dequantize(tensors["one.weight"])
    assert torch.allclose(read_back(tmp_path, "one"), expected, rtol=1e-6, atol=1e-7)


def test_convolutions_and_fractional_zeros_stay_dense_and_are_named(tmp_path):
    written = to_pack_quantized(quantize_weights(Mixed(), Recipe(8)), tmp_path)
    assert written.dense == {"conv.weight": "not a Linear layer's weight"}
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert state["conv.weight"].dtype == torch.float32
    with pytest.raises(ExportError, match=r"one\.weight: its zeros are fractional.*symmetric=True"):
        to_pack_quantized(quantize_weights(Mixed(), Recipe(4)), tmp_path)


def test_tables_that_are_looked_up_stay_dense_also_where_a_decoder_shares_them(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.linear = nn.Embedding(16, 32), nn.Linear(32, 32)
            self.decoder = nn.Linear(32, 16, bias=False)
            self.decoder.weight = self.table.weight

    path = quantize(Tied(), 8, progress=False).save(tmp_path / "a.safetensors")
    written = to_pack_quantized(read_artifact(path).weights, tmp_path)
    assert written.packed == ("linear",)
    assert written.dense == {"table.weight": "looked up, not multiplied"}
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert torch.equal(state["decoder.weight"], state["table.weight"])
