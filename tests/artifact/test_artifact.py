"""The file against real damage, real processes and real disks."""

import json
import os
import struct
import subprocess
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from clipquant.artifact import (
    ArtifactError,
    load_quantized,
    read_artifact,
    read_metadata,
    save_artifact,
    serialize,
    serialized_size,
    verify_artifact,
)
from clipquant.artifact.envelope import seal, sealed_size
from clipquant.quant.codes.grid import Coded, row_levels
from clipquant.quant.codes.tensor import dequantize
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Tied(nn.Module):
    def __init__(self, width=6):
        super().__init__()
        self.embed = nn.Embedding(7, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, 7)
        self.out.weight = self.embed.weight


@pytest.fixture
def path(tmp_path):
    torch.manual_seed(0)
    return save_artifact(
        quantize_weights(Tied(), Recipe(3, method="rtn")), tmp_path / "model.safetensors"
    )


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
def test_what_is_read_is_what_was_written(tmp_path, bits, granularity):
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2), nn.Linear(5, 3).double())
    weights = quantize_weights(model, Recipe(bits, granularity=granularity))
    read = read_artifact(save_artifact(weights, tmp_path / "a")).weights
    for name, tensor in weights.tensors.items():
        assert torch.equal(read.tensors[name].codes, tensor.codes)
        assert torch.equal(dequantize(read.tensors[name]), dequantize(tensor))
        assert read.tensors[name].layout == tensor.layout
    state = load_quantized(tmp_path / "a")
    assert {k: v.dtype for k, v in state.items()} == {
        k: v.dtype for k, v in model.state_dict().items()
    }


def test_the_file_is_plain_safetensors_with_the_names_of_the_format(path):
    stored = safetensors.torch.load_file(path)
    assert {"embed.weight.q", "embed.weight.scale", "embed.weight.zero"} <= stored.keys()
    assert "embed.weight" not in stored
    assert "out.weight" not in stored
    assert stored["embed.weight.q"].dtype == torch.uint8
    assert stored["embed.weight.q"].shape == ((7 * 6 * 3 + 7) // 8,)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["clipquant"])
    assert about["format_version"] == 2
    assert about["aliases"] == {"out.weight": "embed.weight"}
    assert about["tensors"]["embed.weight"] == {"bits": 3, "method": "rtn", "shape": [7, 6]}
    assert read_metadata(path) == about


def test_the_same_weights_give_the_same_bytes():
    torch.manual_seed(0)
    model = Tied()
    assert serialize(quantize_weights(model)) == serialize(quantize_weights(model))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_the_file_is_no_larger_than_codes_scales_and_6_kb(bits):
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3), nn.Conv2d(32, 64, 3), nn.Linear(9216, 128), nn.Linear(128, 10)
    )
    weights = quantize_weights(model, Recipe(bits))
    numel = sum(tensor.numel for tensor in weights.tensors.values())
    sides = [t for q in weights.tensors.values() for t in (q.scale, q.zero) if t is not None]
    floats = sum(t.nbytes for t in weights.floats.values())
    bound = numel * bits / 8 + sum(t.nbytes for t in sides) + floats + 6000
    assert len(serialize(weights)) <= bound


KINDS = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32]
KINDS += [torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64]


@given(
    tensors=st.dictionaries(
        st.text(min_size=1, max_size=4), st.tuples(st.sampled_from(KINDS), st.integers(0, 99))
    ),
    note=st.text(max_size=20),
)
def test_the_size_is_known_without_writing(tensors, note):
    held = {name: torch.zeros(n, 3).to(dtype) for name, (dtype, n) in tensors.items()}
    held.pop("__metadata__", None)
    about = {"note": note}
    assert sealed_size(held, about) == len(seal(held, about))


def test_the_size_of_packed_rows_is_known_without_packing():
    weights = quantize_weights(Tied(), Recipe(8))
    bits = torch.arange(7, dtype=torch.uint8)
    tensor = weights.tensors["embed.weight"]
    codes = (tensor.codes % 2 ** bits.long()[:, None]).to(torch.uint8)
    rows = replace(
        tensor, coded=Coded(codes, replace(tensor.grid, levels=row_levels(bits))), bits=bits
    )
    weights = replace(weights, tensors={"embed.weight": rows})
    assert serialized_size(weights, {"a": 1}) == len(serialize(weights, {"a": 1}))


def test_tied_tensors_and_buffers_come_back_strictly(path):
    state = load_quantized(path)
    assert torch.equal(state["embed.weight"], state["out.weight"])
    assert state["norm.num_batches_tracked"].dtype == torch.int64
    model = Tied()
    assert load_quantized(path, model) is model
    assert model.out.weight is model.embed.weight
    model.load_state_dict(state, strict=True)


def flip(data, index, mask):
    damaged = bytearray(data)
    damaged[index] ^= mask
    return bytes(damaged)


def test_a_flip_of_any_byte_is_found(path):
    data = path.read_bytes()
    for index in range(len(data)):
        path.write_bytes(flip(data, index, 1 + index % 255))
        assert verify_artifact(path), f"byte {index}"
    path.write_bytes(data)
    assert verify_artifact(path) == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(where=st.floats(0, 1, exclude_max=True), mask=st.integers(1, 255))
def test_loading_refuses_a_flipped_byte(path, where, mask):
    data = path.read_bytes()
    path.write_bytes(flip(data, int(where * len(data)), mask))
    try:
        with pytest.raises(ArtifactError):
            load_quantized(path)
    finally:
        path.write_bytes(data)


def test_the_damaged_tensor_is_named(path):
    data = path.read_bytes()
    end = 8 + struct.unpack("<Q", data[:8])[0]
    offsets = json.loads(data[8:end])["embed.weight.q"]["data_offsets"]
    path.write_bytes(flip(data, end + offsets[0] + 2, 4))
    assert verify_artifact(path) == ["embed.weight.q"]
    with pytest.raises(ArtifactError, match=r"damaged: embed\.weight\.q"):
        load_quantized(path)


@pytest.mark.parametrize("keep", [0, 5, 8, 100, -1])
def test_a_truncated_file_is_refused(path, keep):
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match="damaged"):
        load_quantized(path)


def test_a_longer_file_is_refused(path):
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match="damaged"):
        load_quantized(path)


def test_a_newer_format_is_refused_naming_both_versions(path, monkeypatch):
    for name in ("envelope.FORMAT_VERSION", "schema.DENSE_VERSION"):
        monkeypatch.setattr(f"clipquant.artifact.{name}", 7)
    save_artifact(quantize_weights(Tied()), path)
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=r"format_version 7; this clipquant reads up to 3"):
        load_quantized(path)
    assert "Upgrade" in verify_artifact(path)[0]


def test_foreign_files_are_refused(tmp_path):
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2)}, other)
    with pytest.raises(ArtifactError, match="without clipquant's metadata"):
        load_quantized(other)
    other.write_bytes(b"PK\x03\x04 surely not this one")
    with pytest.raises(ArtifactError, match="no safetensors file"):
        load_quantized(other)
    with pytest.raises(ArtifactError, match="no such file"):
        load_quantized(tmp_path / "none")


def test_another_architecture_is_refused_by_name_and_left_untouched(path):
    class Other(Tied):
        def __init__(self):
            super().__init__(width=5)
            del self.norm
            self.extra = nn.Linear(2, 2)

    model = Other()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ArtifactError) as error:
        load_quantized(path, model)
    text = str(error.value)
    assert "missing from the file: extra.bias, extra.weight" in text
    assert "not in the model: norm.bias" in text
    assert "embed.weight is (7, 6) in the file, (7, 5) in the model" in text
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_full_disk_leaves_the_old_file_and_no_litter(path, monkeypatch):
    old = path.read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save_artifact(quantize_weights(Tied(), Recipe(8)), path)
    assert path.read_bytes() == old
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounting needs root")
def test_a_disk_that_is_really_full_leaves_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        path = save_artifact(quantize_weights(Tied()), disk / "a")
        old = path.read_bytes()
        with pytest.raises(OSError, match="No space left"):
            save_artifact(quantize_weights(nn.Linear(300, 400)), path)
        assert path.read_bytes() == old
        assert [p.name for p in disk.iterdir()] == ["a"]
        load_quantized(path)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_tensor_with_a_name_of_the_files_own_is_refused(tmp_path):
    model = nn.Linear(3, 3)
    weights = quantize_weights(model)
    weights.floats["weight.q"] = torch.zeros(1)
    with pytest.raises(ArtifactError, match="a name of the file's own"):
        save_artifact(weights, tmp_path / "a")


def test_no_pickle_is_read_in_a_fresh_process(path):
    """Loading works in a process where unpickling anything raises."""
    code = (
        "import sys, pickle, _pickle\n"
        "from clipquant import load_quantized\n"
        "def refuse(*a, **k): raise SystemExit('unpickled')\n"
        "pickle.loads = pickle.load = _pickle.loads = _pickle.load = refuse\n"
        f"print(sorted(load_quantized({str(path)!r}))[0])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "embed.weight", done.stderr
