"""Files whose codes stand in an entropy code: the same weights in fewer bytes, and nothing less safe."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.artifact import (
    ArtifactError,
    read_artifact,
    read_metadata,
    read_outline,
    save_artifact,
    serialize,
    serialized_size,
    verify_artifact,
)
from clipquant.errors import ArgumentError, MissingPackageError
from clipquant.quant.codes.coding import with_coding
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.report import report_of

pytest.importorskip("constriction")


def net(zeros=0.9):
    """Return a network of every kind of layout, most of its weights zero."""
    torch.manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 3, groups=2), nn.Flatten(), nn.LazyLinear(20),
        nn.Linear(20, 300),
    )  # fmt: skip
    made(torch.zeros(1, 3, 8, 8))
    for p in made.parameters():
        if p.dim() > 1:
            p.data *= torch.rand_like(p) >= zeros
    return made.eval()


@pytest.fixture(scope="module")
def made():
    return quantize(net(), 2, progress=False)


@pytest.fixture
def path(made, tmp_path):
    return made.save(tmp_path / "coded.safetensors", coding="entropy")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_same_weights_in_fewer_bytes(made, path, tmp_path):
    dense = made.save(tmp_path / "dense.safetensors")
    assert path.stat().st_size < 0.75 * dense.stat().st_size
    assert same(load_quantized(path), load_quantized(dense))
    assert verify_artifact(path) == []
    assert read_metadata(path)["format_version"] == 3


def test_dense_files_are_what_they_were(made, tmp_path):
    """No record, no version and no byte tells that there is another coding."""
    dense = made.coded("entropy").coded("dense")
    assert serialize(dense.weights) == serialize(made.weights)
    about = read_metadata(save_artifact(made.weights, tmp_path / "a"))
    assert about["format_version"] == 2
    assert not any("coding" in said for said in about["tensors"].values())


@pytest.mark.parametrize("granularity", ["tensor", 16])
def test_sizes_are_told_before_they_are_written(granularity, tmp_path):
    weights = with_coding(quantize_weights(net(), Recipe(3, granularity=granularity)), "entropy")
    size = save_artifact(weights, tmp_path / "a").stat().st_size
    assert size == serialized_size(weights) == len(serialize(weights))
    assert same(read_artifact(tmp_path / "a").weights.state_dict(), weights.state_dict())


def test_the_report_tells_coded_bytes_and_entropy(made, path, capsys):
    coded = made.coded("entropy")
    assert coded.report.size_bytes == path.stat().st_size
    last = coded.report.layers[-1]
    assert last.coded_bits == pytest.approx(last.entropy, rel=0.1)
    assert last.bytes < made.report.layers[-1].bytes
    assert coded.report.bits_per_weight < made.report.bits_per_weight
    held = read_outline(path)
    told = report_of(held.weights, held.metadata, path.stat().st_size)
    assert [layer.bytes for layer in told.layers] == [layer.bytes for layer in coded.report.layers]
    assert told.layers[-1].coded_bits == last.coded_bits
    assert f"coded {last.coded_bits:.3g}" in _shown(path, capsys)


def _shown(path, capsys):
    from clipquant.cli import main

    assert main(["inspect", str(path)]) == 0
    return capsys.readouterr().out


def test_weights_are_held_packed_in_memory(path):
    packed = load_quantized(path, copy.deepcopy(net()), packed=True)
    plain = load_quantized(path, net())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(packed(x), plain(x))
    held = sum(b.nbytes for n, b in packed.named_buffers() if "codes" in n)
    assert held <= sum(-(-p.numel() // 4) for p in plain.parameters() if p.dim() > 1)


def test_rows_of_their_own_bits_and_of_none(tmp_path):
    data = [torch.randn(64, 20)]
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = quantize(model, "auto", max_size=0.5, data=data, progress=False, coding="entropy")
    path = auto.save(tmp_path / "a")
    assert path.stat().st_size == auto.report.size_bytes
    assert same(load_quantized(path), auto.state_dict())


def test_without_the_library_a_coded_file_names_the_extra_and_others_load(
    made, path, tmp_path, monkeypatch
):
    dense = made.save(tmp_path / "dense.safetensors")
    monkeypatch.setitem(sys.modules, "constriction", None)
    load_quantized(dense)
    for read in (load_quantized, read_artifact, lambda p: load_quantized(p, net(), packed=True)):
        with pytest.raises(ArtifactError, match=r"coded.*constriction.*clipquant\[entropy\]"):
            read(path)
    assert "clipquant[entropy]" in verify_artifact(path)[0]
    assert read_outline(path).weights.tensors, "what a file says of itself needs no codes"
    with pytest.raises(MissingPackageError, match=r"clipquant\[entropy\]"):
        made.save(tmp_path / "b", coding="entropy")
    with pytest.raises(MissingPackageError, match=r"clipquant\[entropy\]"):
        quantize(net(), 2, coding="entropy")


def test_a_coding_that_is_none_is_refused(made, tmp_path):
    for call in (
        lambda: quantize(net(), 2, coding="zip"),
        lambda: made.save(tmp_path / "a", coding=4),
    ):
        with pytest.raises(ArgumentError, match="coding must be one of 'dense', 'entropy', 'auto'"):
            call()


def test_codes_that_do_not_belong_to_their_stream_are_not_written(made, tmp_path):
    from dataclasses import replace

    weights = with_coding(made.weights, "entropy")
    name, tensor = next((n, t) for n, t in weights.tensors.items() if t.stream is not None)
    other = replace(tensor, coded=replace(tensor.coded, codes=1 - tensor.codes.clamp(max=1)))
    with pytest.raises(ArtifactError, match=f"{name} differs"):
        save_artifact(replace(weights, tensors={**weights.tensors, name: other}), tmp_path / "a")
    assert not (tmp_path / "a").exists()
