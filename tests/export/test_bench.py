"""Exported files side by side: every format that runs here, what cannot be timed told."""

import sys

import pytest
import torch
from torch import nn

from clipquant.export import FORMATS, Example, ExportError, Subject, bench
from clipquant.export.bench import bench_files
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A file of each format that can be run here."""
    torch.manual_seed(0)
    model, folder = nn.Sequential(nn.Linear(32, 16), nn.ReLU()), tmp_path_factory.mktemp("files")
    example = Example((torch.randn(4, 32),))
    subject = Subject(quantize_weights(model, Recipe(8)), model, example, calibration=[example])
    formats = [known for known in FORMATS.values() if known.opens]
    return [known.write(subject, folder / known.file).path for known in formats]


@pytest.fixture
def unweighed(monkeypatch):
    """Memory is asked of no fresh process, which would take seconds a file."""
    monkeypatch.setattr(bench, "_resident", lambda *_: None)


def test_every_format_that_runs_here_is_timed_at_every_batch(files, unweighed):
    for one in bench_files(files, [1, 3]):
        assert one.latency.keys() == {1, 3}
        assert all(ms > 0 for ms in one.latency.values())


def test_memory_is_that_of_a_fresh_process(files):
    (one,) = bench_files([file for file in files if file.endswith("model.onnx")], [1])
    assert one.latency.keys() == {1}
    if sys.platform == "linux":
        assert 0 < one.resident < 1 << 30


def test_a_batch_that_a_file_fixes_is_left_out(tmp_path, unweighed):
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 2)

        def forward(self, x):
            return self.linear(x).reshape(4, 2)

    model = Fixed()
    subject = Subject(quantize_weights(model, Recipe(8)), model, Example((torch.randn(4, 32),)))
    path = FORMATS["pt2"].write(subject, tmp_path / "a.pt2").path
    assert bench_files([path], [1, 4])[0].latency.keys() == {4}


def test_threads_are_put_back_and_what_is_no_export_is_told(files, tmp_path):
    before = torch.get_num_threads()
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ExportError, match=r"a\.txt ends in neither \.onnx nor \.pt2"):
        bench_files([files[0], tmp_path / "a.txt"], [1], threads=before + 1)
    with pytest.raises(ExportError, match=r"none\.onnx is no file: pass \.onnx and \.pt2 files"):
        bench_files([tmp_path / "none.onnx"])
    assert torch.get_num_threads() == before
