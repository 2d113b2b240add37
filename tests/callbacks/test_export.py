"""QuantizeOnFitEnd's exports, in real fits."""

import json
import threading

import lightning.pytorch as pl
import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from clipquant import QuantizeOnFitEnd, load_quantized

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.linear = nn.Linear(144, 3)

    def forward(self, x):
        return self.linear(torch.relu(self.conv(x)).flatten(1))

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Branches(Net):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Indirect(Net):
    """Its steps do not call forward, and its batches do not say what forward takes."""

    def forward(self, x, a, b, c):
        return super().forward(x)

    def training_step(self, batch, _):
        return nn.functional.cross_entropy(Net.forward(self, batch[0]), batch[1])

    def validation_step(self, batch, _):
        self.log("val_acc", (Net.forward(self, batch[0]).argmax(1) == batch[1]).float().mean())


def loader():
    torch.manual_seed(0)
    data = [(torch.randn(1, 8, 8), int(i % 3)) for i in range(48)]
    return DataLoader(data, batch_size=16)


def fit(model, tmp_path, **arguments):
    arguments = {"monitor": "val_acc", "mode": "max"} | arguments
    callback = QuantizeOnFitEnd(dirpath=tmp_path, **arguments)
    trainer = pl.Trainer(max_epochs=1, callbacks=[callback], default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, loader(), loader())
    return callback


def test_every_format_is_written_and_reported(tmp_path, capsys):
    model = Net()
    callback = fit(model, tmp_path, export=["pt2", "onnx", "onnx-int8"])
    records = {record["format"]: record for record in callback.report.exports}
    assert [record["error"] for record in records.values()] == [None] * 3
    x = torch.randn(5, 1, 8, 8)
    with torch.no_grad():
        expected = load_quantized(callback.artifact_path, Net()).eval()(x)
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(program(x), expected, atol=1e-5)
    for name, bound in (("model.onnx", 1e-4), ("model.int8.onnx", 0.1)):
        session = ort.InferenceSession(str(tmp_path / name))
        actual = session.run(None, {"x": x.numpy()})[0]
        assert np.abs(actual - expected.numpy()).max() < bound
    int8 = records["onnx-int8"]
    assert abs(int8["metrics"]["val_acc"] - callback.report.quantized_metrics["val_acc"]) < 0.1
    assert int8["latency"]["batch 1, ratio"] > 0
    assert json.loads((tmp_path / "report.json").read_text())["exports"][2]["format"] == "onnx-int8"
    assert "Export onnx-int8: " in capsys.readouterr().out


class Pairs(Net):
    """Forward takes one argument, a pair: as tensors of a batch, they look like inputs and targets."""

    def forward(self, pair):
        return super().forward(pair[0] + pair[1])

    def training_step(self, batch, _):
        return self(batch).square().mean()

    def validation_step(self, batch, _):
        self.log("val_acc", self(batch).square().mean())


def test_the_example_is_what_the_validation_step_gives_forward(tmp_path, monkeypatch):
    data = [(x, x) for x, _ in loader().dataset]
    monkeypatch.setitem(globals(), "loader", lambda: DataLoader(data, batch_size=16))
    callback = fit(Pairs(), tmp_path, export=["pt2", "onnx", "onnx-int8"])
    assert [record["error"] for record in callback.report.exports] == [None] * 3
    x, y = torch.randn(2, 5, 1, 8, 8)
    with torch.no_grad():
        expected = load_quantized(callback.artifact_path, Pairs()).eval()((x, y))
    program = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(program([x, y]), expected, atol=1e-5)
    for name, bound in (("model.onnx", 1e-4), ("model.int8.onnx", 0.2)):
        session = ort.InferenceSession(str(tmp_path / name))
        names = [given.name for given in session.get_inputs()]
        actual = session.run(None, dict(zip(names, (x.numpy(), y.numpy()), strict=True)))[0]
        assert np.abs(actual - expected.numpy()).max() < bound


def test_a_model_that_cannot_be_captured_keeps_its_artifact_and_the_reason(tmp_path, capsys):
    callback = fit(Branches(), tmp_path, export=["pt2", "onnx"])
    assert callback.artifact_path.is_file()
    for record in callback.report.exports:
        assert "cannot capture Branches.forward" in record["error"]
        assert record["path"] is None
    said = capsys.readouterr().out
    assert said.count("Export pt2, onnx failed: torch.export cannot capture") == 1
    assert not (tmp_path / "model.pt2").exists()


def test_an_example_that_cannot_be_inferred_is_told_in_the_report(tmp_path):
    callback = fit(Indirect(), tmp_path, export=["pt2"])
    assert "example_input_array" in callback.report.exports[0]["error"]
    assert callback.artifact_path.is_file()


def test_a_module_that_cannot_be_copied_keeps_its_artifact_and_the_reason(tmp_path):
    model = Net()
    model.lock = threading.Lock()
    callback = fit(model, tmp_path, export=["pt2", "onnx"])
    assert callback.artifact_path.is_file()
    assert all("cannot pickle" in record["error"] for record in callback.report.exports)


def test_steps_that_go_around_forward_are_judged_by_distance(tmp_path):
    class Around(Indirect):
        def forward(self, x):
            return Net.forward(self, x)

        def validation_step(self, batch, _):
            logits = self.linear(torch.relu(self.conv(batch[0])).flatten(1))
            self.log("val_acc", (logits.argmax(1) == batch[1]).float().mean())

    record = fit(Around(), tmp_path, export=["onnx-int8"]).report.exports[0]
    assert record["error"] is None
    assert record["metrics"] == {}
    assert "judged by the distance" in record["notes"][-2]
    assert "validation_step does not call self(...)" in record["notes"][-1]


class Keywords(Net):
    """Its step gives forward the labels too, by name, and takes the loss from a dict: transformers' form."""

    def forward(self, *, pixels, labels=None):
        logits = super().forward(pixels)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}

    def training_step(self, batch, _):
        return self(pixels=batch[0], labels=batch[1])["loss"]

    def validation_step(self, batch, _):
        self.log("val_loss", self(pixels=batch[0], labels=batch[1])["loss"])


def test_int8_of_a_step_that_gives_labels_by_name_is_judged_by_its_outputs(tmp_path):
    quantizer = fit(Keywords(), tmp_path, export=["onnx-int8"], monitor="val_loss", mode="min")
    (record,) = quantizer.report.exports
    assert record["error"] is None
    assert any("validation_step gives forward labels too" in note for note in record["notes"])
    session = ort.InferenceSession(str(tmp_path / "model.int8.onnx"))
    assert [given.name for given in session.get_inputs()] == ["pixels"]
    assert [given.name for given in session.get_outputs()] == ["logits"]


@pytest.mark.parametrize("formats", [["onnx"], ["onnx-int8"]])
def test_a_missing_library_is_told_before_training(formats, tmp_path, monkeypatch):
    monkeypatch.setattr("clipquant.export.parts.needs.find_spec", lambda name: None)
    model = Net()
    before = model.linear.weight.clone()
    with pytest.raises(ImportError, match=r"pip install 'clipquant\[onnx\]'"):
        fit(model, tmp_path, export=formats)
    assert torch.equal(model.linear.weight, before)


def test_impossible_requests_are_refused_at_once():
    with pytest.raises(ValueError, match=r"export must be a list of 'pt2', .*got \['tflite'\]"):
        QuantizeOnFitEnd(export=["tflite"])
    with pytest.raises(ValueError, match="export must be a list"):
        QuantizeOnFitEnd(export="onnx")
    with pytest.raises(ValueError, match="calibration_batches=0"):
        QuantizeOnFitEnd(export=["onnx-int8"], calibration_batches=0)
