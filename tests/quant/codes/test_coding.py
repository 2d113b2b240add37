"""Which codes a file holds in an entropy code."""

import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

from clipquant.errors import ArgumentError, MissingPackageError
from clipquant.quant.codes import coding
from clipquant.quant.codes.coding import check_coding, streamed, with_coding
from clipquant.quant.codes.entropy import decode
from clipquant.quant.codes.pack import packed_bytes
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe

pytest.importorskip("constriction")


def weights(bits=4, zeros=0.0, more=0):
    """Return weights of a layer, a share of them zero, beside `more` floats."""
    torch.manual_seed(0)
    layer = nn.Linear(100, 64)
    with torch.no_grad():
        layer.weight.mul_(torch.rand_like(layer.weight) >= zeros)
    if more:
        layer.register_buffer("more", torch.zeros(more))
    return quantize_weights(layer, Recipe(bits))


def streams(made):
    return {name for name, tensor in made.tensors.items() if tensor.stream is not None}


def test_dense_leaves_streams_out():
    made = with_coding(weights(2, 0.9), "entropy")
    assert streams(made) == {"weight"}
    assert not streams(with_coding(made, "dense"))


def test_entropy_takes_the_smaller_and_gives_the_codes_back():
    made = with_coding(weights(2, 0.9), "entropy")
    tensor = made.tensors["weight"]
    dense = packed_bytes(2, (64, 100))
    assert tensor.stream.nbytes < 0.5 * dense
    assert torch.equal(decode(tensor.stream, tensor.grid, 2, (64, 100)), tensor.codes)
    flat = replace(tensor, coded=replace(tensor.coded, codes=torch.randint(0, 3, (64, 100)).byte()))
    assert streamed(flat).stream.nbytes < dense, "three codes of equal share take 1.58 bits"
    flat = weights(4).tensors["weight"]
    flat = replace(flat, coded=replace(flat.coded, codes=torch.randint(0, 16, (64, 100)).byte()))
    assert streamed(flat).stream is None


@pytest.mark.parametrize(("more", "coded"), [(0, {"weight"}), (20_000, set())])
def test_auto_asks_for_5_percent_of_the_file(more, coded):
    assert streams(with_coding(weights(2, 0.9, more), "auto")) == coded
    assert streams(with_coding(weights(2, 0.9, more), "entropy")) == {"weight"}


def test_auto_does_without_the_library(monkeypatch):
    monkeypatch.setattr(coding, "find_spec", lambda name: None)
    assert not streams(with_coding(weights(2, 0.9), "auto"))


def test_what_cannot_be_is_refused(monkeypatch):
    with pytest.raises(
        ArgumentError, match=r"coding must be one of 'dense', 'entropy', 'auto'; got True"
    ):
        check_coding(True)
    monkeypatch.setitem(sys.modules, "constriction", None)
    check_coding("auto")
    with pytest.raises(MissingPackageError, match=r"clipquant\[entropy\]"):
        check_coding("entropy")
