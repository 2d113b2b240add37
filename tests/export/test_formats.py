"""The registry, and a format of one's own through everything that reads it."""

import json
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clipquant import QuantizeOnFitEnd, quantize
from clipquant.cli import main
from clipquant.errors import ArgumentError, MissingPackageError
from clipquant.export import FORMATS, ExportError, ExportRecord, Format, Subject, as_format
from clipquant.export.bench import bench_files

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


@dataclass(frozen=True)
class Toy(Format):
    """Says how many codes there are."""

    shout: bool = False
    name = "toy"
    suffix = ".toy"

    def write(self, subject, path):
        _, example = subject.call()
        codes = sum(tensor.numel for tensor in subject.weights.tensors.values())
        text = f"{codes} codes, {example.batch_size} rows{'!' if self.shout else ''}"
        Path(path).write_text(text)
        return ExportRecord(self.name, str(path), len(text), 0.0)

    def open(self, path, threads=None):
        text = Path(path).read_text()
        return lambda batch: lambda: text * batch


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.example_input_array = torch.zeros(2, 6)

    def forward(self, x):
        return self.linear(x)

    def training_step(self, batch, _):
        return self(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self):
        return DataLoader([(torch.randn(6), 0) for _ in range(4)], batch_size=2)


@pytest.fixture
def registered(monkeypatch):
    """The toy format as one entry in the registry."""
    monkeypatch.setitem(FORMATS, "toy", Toy())


def fit(tmp_path, formats):
    callback = QuantizeOnFitEnd(dirpath=tmp_path, export=formats)
    pl.Trainer(max_steps=1, callbacks=[callback], default_root_dir=tmp_path, **QUIET).fit(Net())
    return callback.report.exports


@pytest.mark.parametrize("given", ["toy", Toy(shout=True)], ids=["by name", "as an object"])
def test_the_callback_writes_a_format_of_ones_own(given, tmp_path, registered):
    (record,) = fit(tmp_path, [given])
    assert record["error"] is None
    end = "!" if isinstance(given, Toy) else ""
    assert (tmp_path / "model.toy").read_text() == f"18 codes, 2 rows{end}"


def write_net(folder):
    """Write a module whose user keeps the network and the format in a file of their own."""
    (folder / "toy_format_net.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_formats import Net, Toy\n"
    )


def test_the_command_line_writes_and_times_it(tmp_path, monkeypatch, capsys, registered):
    artifact = quantize(Net(), 4).save(tmp_path / "a.safetensors")
    write_net(tmp_path)
    monkeypatch.chdir(tmp_path)
    for given in ("toy", "toy_format_net:Toy"):
        command = ["export", str(artifact), "--model", "toy_format_net:Net", "--format", given]
        assert main([*command, "--output", f"{given[-3:]}.toy"]) == 0
    assert (tmp_path / "toy.toy").read_text() == (tmp_path / "Toy.toy").read_text()
    assert (tmp_path / "toy.toy").read_text() == "18 codes, 2 rows"
    assert main(["bench", "toy.toy", "--batch", "3"]) == 0
    assert "toy.toy" in capsys.readouterr().out
    assert bench_files(["toy.toy"], [3])[0].latency.keys() == {3}


@pytest.mark.parametrize(
    "given", ["toy", "{class_path: toy_format_net.Toy, init_args: {shout: true}}"]
)
def test_a_yaml_file_names_it_or_builds_it(given, tmp_path, monkeypatch, registered):
    write_net(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = tmp_path / "config.yaml"
    config.write_text(
        f"trainer:\n  default_root_dir: {tmp_path}\n  max_steps: 1\n  accelerator: cpu\n  logger: false\n"
        "  enable_checkpointing: false\n  enable_progress_bar: false\n  callbacks:\n"
        "    - class_path: QuantizeOnFitEnd\n      init_args:\n"
        f"        dirpath: {tmp_path}/q\n        export: [{given}]\n"
        "model:\n  class_path: toy_format_net.Net\n"
    )
    assert main(["fit", "--config", str(config)]) == 0
    end = "" if given == "toy" else "!"
    assert (tmp_path / "q" / "model.toy").read_text() == f"18 codes, 2 rows{end}"
    assert json.loads((tmp_path / "q" / "report.json").read_text())["exports"][0]["format"] == "toy"


def test_every_format_has_a_name_and_an_ending_of_its_own():
    assert [known.name for known in FORMATS.values()] == list(FORMATS)
    files = [known.file for known in FORMATS.values()]
    assert len(set(files)) == len(files)
    assert files[:3] == ["model.pt2", "model.onnx", "model.int8.onnx"]


def test_an_unknown_name_is_told_with_those_that_are_known(tmp_path, capsys):
    with pytest.raises(ArgumentError, match=r"one of 'pt2', 'onnx'.*got 'tflite'"):
        as_format("tflite")
    with pytest.raises(SystemExit) as stopped:
        main(["export", "a.safetensors", "--format", "tflite"])
    assert stopped.value.code == 2
    assert "one of 'pt2', 'onnx'" in capsys.readouterr().err
    assert main(["export", "a.safetensors", "--format", "json:dumps"]) == 1
    assert "'json:dumps' is no Format" in capsys.readouterr().err


def test_a_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    @dataclass(frozen=True)
    class Wanting(Toy):
        name = "wanting"
        needs = ("no_such_package",)
        extra = "wanting"

    with pytest.raises(MissingPackageError, match=r"no_such_package.*clipquant\[wanting\]"):
        fit(tmp_path, [Wanting()])
    assert not (tmp_path / "model.safetensors").exists()
    monkeypatch.setitem(FORMATS, "wanting", Wanting())
    artifact = quantize(Net(), 4).save(tmp_path / "a.safetensors")
    assert main(["export", str(artifact), "--format", "wanting"]) == 1
    assert "no_such_package" in capsys.readouterr().err


def test_a_format_that_is_traced_asks_for_what_is_missing(tmp_path, capsys):
    weights = quantize(Net(), 4).weights
    for subject, said in ((Subject(weights), "nothing"), (Subject(weights, Net()), "no example")):
        with pytest.raises(ExportError, match=said):
            FORMATS["pt2"].write(subject, tmp_path / "a.pt2")
    artifact = quantize(Net(), 4).save(tmp_path / "a.safetensors")
    assert main(["export", str(artifact), "--format", "pt2"]) == 1
    assert "pass its class as --model" in capsys.readouterr().err


def test_compressed_tensors_needs_no_model_and_says_what_stays_dense(tmp_path, capsys):
    net = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Linear(8, 8))
    artifact = quantize(net, 8).save(tmp_path / "a.safetensors")
    assert main(["export", str(artifact), "--format", "compressed-tensors"]) == 0
    said = capsys.readouterr().out
    assert "written dequantized: 0.weight (not a Linear layer's weight)" in said
    folder = tmp_path / "a.compressed-tensors"
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert f"{size:,} bytes\n" in said
    (record,) = fit(tmp_path, ["compressed-tensors"])
    assert record["error"] is None
    assert (tmp_path / "model.compressed-tensors" / "model.safetensors").is_file()
    with pytest.raises(ExportError, match="not run here"):
        FORMATS["compressed-tensors"].open(folder)
