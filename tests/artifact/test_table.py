"""Files of many small tensors: what a header costs, and the compressed table in its place."""

import json
import zlib

import pytest
import safetensors.torch
import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.artifact import ArtifactError, read_artifact, read_metadata, verify_artifact
from clipquant.artifact.table import inflate
from clipquant.fields import FieldError


def residual(width=16, layers=50):
    torch.manual_seed(0)
    each = (
        nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.ELU()) for _ in range(layers)
    )
    return nn.Sequential(*each, nn.Linear(width, 1))


def attention(width=24, layers=6):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(width, 4, 2 * width, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def payload(weights):
    parts = [t for q in weights.tensors.values() for t in (q.scale, q.zero, q.bits)]
    codes = sum((q.code_bits + 7) // 8 for q in weights.tensors.values())
    return codes + sum(
        t.nbytes for t in [*parts, *weights.floats.values()] if isinstance(t, torch.Tensor)
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "model", [residual(), attention(), nn.Linear(8, 4), nn.LSTM(8, 8, 3), residual(4, 200)]
)
def test_a_file_costs_1500_bytes_and_40_a_tensor_beside_what_it_holds(tmp_path, model, bits):
    made = quantize(model, bits, method="rtn")
    size = made.save(tmp_path / "a").stat().st_size
    assert size - payload(made.weights) <= 1500 + 40 * len(made.weights.state_dict())
    assert size == made.report.size_bytes


def test_a_model_of_many_small_layers_is_smaller_than_its_floats(tmp_path):
    made = quantize(residual(), 4)
    path = made.save(tmp_path / "a")
    assert path.stat().st_size < made.report.float_bytes / 2
    state = load_quantized(path)
    assert all(torch.equal(v, state[k]) for k, v in made.state_dict().items())


@pytest.fixture
def path(tmp_path):
    return quantize(residual(8, 30), 3, method="rtn").save(tmp_path / "a.safetensors")


def test_foreign_readers_find_bytes_and_a_table(path):
    stored = safetensors.torch.load_file(path)
    assert sorted(stored) == ["clipquant.data", "clipquant.digests", "clipquant.table"]
    table = json.loads(zlib.decompress(stored["clipquant.table"].numpy().tobytes()))
    named = [name for name, _, _ in table["entries"]]
    assert {"0.0.weight.q", "0.0.weight.scale", "0.1.bias"} <= set(named)
    assert len(stored["clipquant.digests"]) == 3 * len(named)
    assert read_metadata(path)["tensors"] == table["tensors"]


def test_every_flipped_byte_behind_a_table_is_found_and_its_tensor_named(path):
    data = path.read_bytes()
    for index in range(0, len(data), 11):
        path.write_bytes(data[:index] + bytes([data[index] ^ 4]) + data[index + 1 :])
        assert verify_artifact(path), index
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    first = 8 + int.from_bytes(data[:8], "little") + header["clipquant.data"]["data_offsets"][0]
    last = first + header["clipquant.data"]["data_offsets"][1] - 1
    path.write_bytes(data[:last] + bytes([data[last] ^ 1]) + data[last + 1 :])
    assert verify_artifact(path) == ["9.0.weight.q"]
    with pytest.raises(ArtifactError, match=r"damaged: 9\.0\.weight\.q"):
        read_artifact(path)


def test_a_table_inflates_to_no_more_than_it_may():
    bomb = zlib.compress(b"[" + b"1," * (40 << 20), 9)
    with pytest.raises(FieldError, match=r"clipquant\.table must be deflated JSON of at most"):
        inflate(bomb, 1 << 30)
    with pytest.raises(FieldError, match="deflated"):
        inflate(b"no zlib", 1 << 20)
    with pytest.raises(FieldError, match="end there"):
        inflate(zlib.compress(b"{}") + b"more", 1 << 20)


@pytest.mark.parametrize("name", ["clipquant.table", "clipquant.data", "clipquant.digests"])
def test_names_of_the_files_own_are_refused(tmp_path, name):
    made = quantize(nn.Linear(4, 4))
    made.weights.floats[name] = torch.zeros(1)
    with pytest.raises(ArtifactError, match="a name of the file's own"):
        made.save(tmp_path / "a")
