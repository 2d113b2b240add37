"""What is mistaken for a quantized file, or for a model: each with what to pass instead."""

import pytest
import torch
from torch import nn

from clipquant import TwoConvNet, load_quantized, quantize
from clipquant.artifact import ArtifactError


@pytest.fixture
def path(tmp_path):
    quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8)), 8).save(tmp_path / "m.safetensors")
    return tmp_path / "m.safetensors"


@pytest.mark.parametrize(
    ("swapped", "words"),
    [
        (lambda path: (nn.Linear(2, 2), path), "the file first and then the model; got a Linear"),
        (lambda path: (path, TwoConvNet), r"got the class TwoConvNet. Pass TwoConvNet\(\.\.\.\)"),
        (lambda path: (path, {}), "got a dict. Pass a torch.nn.Module"),
        (lambda path: (None, nn.Linear(2, 2)), "got a NoneType as the file"),
    ],
)
def test_arguments_of_other_kinds_are_named(path, swapped, words):
    with pytest.raises(TypeError, match=words):
        load_quantized(*swapped(path))


def test_a_checkpoint_is_told_from_a_damaged_file(tmp_path):
    torch.save({"state_dict": nn.Linear(4, 4).state_dict()}, tmp_path / "last.ckpt")
    with pytest.raises(
        ArtifactError, match=r"as checkpoints .* clipquant quantize --config FILE --ckpt_path"
    ):
        load_quantized(tmp_path / "last.ckpt")


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model


def test_a_prefix_is_named_whichever_side_has_it(tmp_path, path):
    inner = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 8))
    with pytest.raises(ArtifactError, match=r"keys of the model begin with 'model\.'"):
        load_quantized(path, Wrapped(inner))
    quantize(Wrapped(inner), 8).save(tmp_path / "whole.safetensors")
    with pytest.raises(ArtifactError, match=r"keys of the file begin with 'model\.'"):
        load_quantized(tmp_path / "whole.safetensors", inner)
    with pytest.raises(ArtifactError, match="Build the model with the arguments"):
        load_quantized(path, nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 9)))
