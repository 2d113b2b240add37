"""From an artifact to the layouts of other packages."""

import pytest
from torch import nn

from clipquant import quantize, to_compressed_tensors
from clipquant.artifact import ArtifactError


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.one = nn.Linear(36, 16)
        self.two = nn.Linear(64, 5, bias=False)


def test_from_an_artifact_what_stays_dense_is_said_aloud(tmp_path):
    path = quantize(Mixed(), 8).save(tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=r"conv\.weight \(not a Linear layer's weight\)"):
        written = to_compressed_tensors(path, tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert written.packed == ("one", "two")


def test_a_file_that_is_no_artifact_is_told(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(b"nothing")
    with pytest.raises(ArtifactError, match="damaged"):
        to_compressed_tensors(tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
