"""clipquant export and clipquant bench, from an artifact alone."""

import textwrap

import numpy as np
import onnxruntime as ort
import pytest
import torch

from clipquant import TwoConvNet, quantize
from clipquant.cli import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    return quantize(TwoConvNet(), 8).save(tmp_path_factory.mktemp("cli") / "model.safetensors")


def export(artifact, *more, model="clipquant.reference:TwoConvNet"):
    return main(["export", str(artifact), "--model", model, *more])


def test_export_writes_beside_the_artifact_and_bench_times_it(artifact, capsys):
    assert export(artifact, "--format", "onnx") == 0
    assert export(artifact, "--format", "pt2", "--output", str(artifact.parent / "b.pt2")) == 0
    said = capsys.readouterr().out
    assert "model.onnx: 1,2" in said
    files = [str(artifact.with_suffix(".onnx")), str(artifact.parent / "b.pt2")]
    assert main(["bench", *files, "--batch", "3"]) == 0
    out = capsys.readouterr().out
    assert "ms, batch 3" in out
    assert "?" not in out


def test_int8_needs_inputs_and_takes_them_from_a_file(artifact, tmp_path, capsys):
    assert export(artifact, "--format", "onnx-int8") == 1
    assert "pass --inputs" in capsys.readouterr().err
    x = np.random.default_rng(0).normal(size=(40, 1, 28, 28)).astype(np.float32)
    np.save(tmp_path / "x.npy", x)
    assert export(artifact, "--format", "onnx-int8", "--inputs", str(tmp_path / "x.npy")) == 0
    assert "activation ranges by" in capsys.readouterr().out
    session = ort.InferenceSession(str(artifact.with_suffix(".int8.onnx")))
    assert session.run(None, {"x": x})[0].shape == (40, 10)


def test_what_cannot_be_is_told_without_a_traceback(artifact, tmp_path, monkeypatch, capsys):
    assert export(artifact, "--format", "pt2", model="nowhere:Net") == 1
    assert "--model 'nowhere:Net' is not package.module:Class" in capsys.readouterr().err
    (tmp_path / "mine_without_example.py").write_text(
        textwrap.dedent("""
        from clipquant import TwoConvNet
        class Net(TwoConvNet):
            def __init__(self):
                super().__init__()
                self.example_input_array = None
        """)
    )
    monkeypatch.chdir(tmp_path)
    assert export(artifact, "--format", "pt2", model="mine_without_example:Net") == 1
    assert "Set self.example_input_array" in capsys.readouterr().err
    assert main(["bench", str(artifact)]) == 1
    assert "ends in neither .onnx nor .pt2" in capsys.readouterr().err


def test_inputs_of_another_shape_and_another_architecture_are_told_in_one_line(
    artifact, tmp_path, capsys
):
    np.save(tmp_path / "flat.npy", np.zeros((3, 784), np.float32))
    assert export(artifact, "--format", "onnx", "--inputs", str(tmp_path / "flat.npy")) == 1
    error = capsys.readouterr().err
    assert "does not fit TwoConvNet.forward: it holds (3, 784)" in error
    assert len(error.strip().splitlines()) == 1
    assert export(artifact, "--format", "onnx", "--model-args", '{"classes": 7}') == 1
    assert "cannot be built" in capsys.readouterr().err
    assert export(artifact, "--format", "onnx", "--model-args", '{"num_classes": 7}') == 1
    assert "fc2.weight is (10, 128) in the file, (7, 128) in the model" in capsys.readouterr().err


def test_a_missing_and_a_damaged_artifact_are_told(artifact, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(artifact.read_bytes()[:100])
    for path in (tmp_path / "none.safetensors", broken):
        assert export(path, "--format", "onnx") == 1
        assert path.name in capsys.readouterr().err
