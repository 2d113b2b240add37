"""Every example runs: configurations through the real command line, scripts as functions; the long ones shortened."""

import csv
import runpy
import warnings
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from clipquant import TwoConvNet, load_quantized
from clipquant.artifact import read_artifact
from clipquant.cli import main
from clipquant.quant.methods import METHODS, AdaRound, Distill, Mse
from clipquant.quant.widths.rows import RowGptq
from clipquant.reference import MNIST5k
from clipquant.reference.fashion_mnist import DEBIAN_FOLDER

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.yaml"))
SHORT = [
    "--trainer.max_epochs=1",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=1",
    "--trainer.log_every_n_steps=1",
    "--data.batch_size=16",
    "--data.eval_batch_size=50",
]
WHOLE = {
    "quickstart": ["--trainer.max_epochs=1"],
    "reference": [],
}


def run(path, folder):
    """Run an example in `folder` and return the path of the artifact and the last value of each logged metric."""
    if "FashionMNIST" in path.read_text() and not DEBIAN_FOLDER.is_dir():
        pytest.skip("the Debian package dataset-fashion-mnist is not installed")
    logger = [
        "--trainer.logger=lightning.pytorch.loggers.CSVLogger",
        f"--trainer.logger.save_dir={folder}",
        f"--trainer.default_root_dir={folder}",
    ]
    assert main(["fit", "--config", str(path), *logger, *WHOLE.get(path.stem, SHORT)]) == 0
    (artifact,) = folder.rglob("*.safetensors")
    (metrics,) = folder.rglob("metrics.csv")
    last = {}
    with metrics.open() as rows:
        for row in csv.DictReader(rows):
            last |= {name: float(value) for name, value in row.items() if value}
    return artifact, last


def test_there_are_examples():
    assert {"quickstart", "reference", "norm_clip_4bit", "fashion_mnist"} <= {
        path.stem for path in EXAMPLES
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs_and_leaves_a_whole_file(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    # One range and one sweep for bits="auto": all that is left out is how good its codes are.
    quick = RowGptq(drawn_in=dict.fromkeys((1, 2, 3, 4), (1.0,)), fine=(1.0,), sweeps=1)
    monkeypatch.setattr("clipquant.quant.widths.allocator.ROWS", quick)
    # Likewise few of the steps that learn codes at 4 bits.
    monkeypatch.setitem(METHODS, "adaround", AdaRound(steps=12))
    monkeypatch.setitem(METHODS, "distill", Distill(steps=4, start=Mse()))
    artifact, metrics = run(path, tmp_path)
    assert main(["verify", str(artifact)]) == 0
    assert {"val_loss", "val_acc", "grad_norm"} <= set(metrics)
    TwoConvNet().load_state_dict(load_quantized(artifact), strict=True)
    out = capsys.readouterr().out
    assert "bits per weight" in out
    assert str(artifact.name) in out.replace("\n", "")
    check = CHECKS.get(path.stem)
    if check:
        check(artifact, metrics)


def check_quickstart(artifact, metrics):
    # One epoch of eight; the whole run reaches more.
    assert metrics["val_acc"] > 0.9
    net, data = TwoConvNet(), MNIST5k()
    load_quantized(artifact, net)
    settings = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "accelerator": "cpu",
    }
    (after,) = Trainer(**settings).validate(net, data, verbose=False)
    assert after["val_acc"] == pytest.approx(metrics["val_acc"], abs=0.003)
    assert artifact.stat().st_size <= 0.26 * sum(4 * p.numel() for p in net.parameters())


def check_reference(artifact, metrics):
    assert metrics["step"] in (99, 100)  # the quantized metrics stand at 100
    assert metrics["train_loss"] < 0.1
    assert metrics["val_acc"] == 1
    weights = read_artifact(artifact).weights
    assert set(weights.tensors) == {"conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"}
    for tensor in weights.tensors.values():
        assert (tensor.levels, tensor.scale.numel(), tensor.symmetric, tensor.method) == (
            8,
            1,
            False,
            "rtn",
        )
        assert (tensor.codes.min(), tensor.codes.max()) == (0, 8)
    for value in (value for name, value in weights.state_dict().items() if name.endswith("weight")):
        low, high = value.min().double(), value.max().double()
        grid = low + torch.arange(9) * (high - low) / 8
        assert (value.double().flatten()[:, None] - grid).abs().min(1).values.max() < 1e-6 * (
            high - low
        )


def check_norm_clip_4bit(artifact, metrics):
    assert metrics["grad_norm_clipped"] <= 1.00001
    tensors = read_artifact(artifact).weights.tensors
    assert {name: tensor.bits for name, tensor in tensors.items()} == {
        "conv1.weight": 8,
        "conv2.weight": 4,
        "fc1.weight": 4,
        "fc2.weight": 8,
    }
    assert tensors["fc1.weight"].group_size == 64


def check_qat_2bit(artifact, metrics):
    tensors = read_artifact(artifact).weights.tensors
    assert {(tensor.bits, tensor.method) for tensor in tensors.values()} == {(2, "qat")}


def check_deep_compression(artifact, metrics):
    weights = read_artifact(artifact).weights
    assert {name: tensor.levels for name, tensor in weights.tensors.items()} == {
        "conv1.weight": 14,
        "conv2.weight": 2,
        "fc1.weight": 2,
        "fc2.weight": 2,
    }
    zeros = sum(int((weights.state_dict()[name] == 0).sum()) for name in weights.tensors)
    assert zeros >= 0.97 * sum(tensor.numel for tensor in weights.tensors.values()) - 1


def check_prune_indicator(artifact, metrics):
    state = load_quantized(artifact)
    for name in ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight"):
        assert float((state[name] == 0).float().mean()) >= 0.79


CHECKS = {
    "prune_indicator": check_prune_indicator,
    "deep_compression": check_deep_compression,
    "qat_2bit": check_qat_2bit,
    "norm_clip_4bit": check_norm_clip_4bit,
    "quickstart": check_quickstart,
    "reference": check_reference,
}


def script(name):
    """Return the `main` of a Python example."""
    return runpy.run_path(str(EXAMPLES[0].with_name(f"{name}.py")))["main"]


def test_example_of_an_own_module(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        report = script("own_module")(max_epochs=1)
    assert report.quantized_metrics["val_acc"] > 0.8
    assert report.mode == "max"
    assert report.ratio > 7
    # Lightning's line about torch stands there as often as the fit alone would say it, not once more for us.
    assert sum("LeafSpec" in str(item.message) for item in told) <= 2
    assert "torch.Size([1, 10])" in capsys.readouterr().out


def test_example_of_hugging_face(tmp_path, monkeypatch, capsys):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    report = script("hugging_face")(max_epochs=1, examples=64, export=())
    names = {layer.name for layer in report.layers}
    assert "model.bert.embeddings.word_embeddings.weight" in names
    assert all(layer.bits == 4 for layer in report.layers)
    assert "tensor([[" in capsys.readouterr().out


def test_example_of_a_trained_checkpoint(tmp_path, capsys):
    net, data = TwoConvNet(lr=0.002), MNIST5k(batch_size=64)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = Trainer(
        max_steps=25, limit_val_batches=0, enable_checkpointing=False, accelerator="cpu", **quiet
    )
    trainer.fit(net, data)
    trainer.save_checkpoint(tmp_path / "net.ckpt")
    before, after = script("trained_checkpoint")(tmp_path / "net.ckpt", tmp_path, method="mse")
    assert before > 0.7
    assert after > before - 0.05
    out = capsys.readouterr().out
    assert "QuantizationReport: 4 weights at 3" in out
    assert f"{(tmp_path / 'model.safetensors').stat().st_size:,} bytes" in out
