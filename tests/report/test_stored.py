"""A report read back from a file alone equals the one written, and the file itself says the same."""

from __future__ import annotations

import hashlib
import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import nn

from clipquant import quantize
from clipquant.artifact import read_artifact, read_metadata, save_artifact
from clipquant.report import Budget, QuantizationReport, Trial, describe, report_of


class Net(nn.Module):
    """A convolution, a linear layer and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3)
        self.fc = nn.Linear(1000, 400)  # large enough that the report costs less than 1 %
        self.table = nn.Embedding(7, 5)


def tensors_of(path: Path) -> dict[str, np.ndarray]:
    """Read a file's tensors with numpy and zlib alone, named by its header or by its table."""
    stored = safetensors.numpy.load(path.read_bytes())
    if "clipquant.table" not in stored:
        return stored
    table = json.loads(zlib.decompress(stored["clipquant.table"].tobytes()))
    kinds = {"U8": np.uint8, "F16": np.float16, "F32": np.float32, "F64": np.float64, "I64": "<i8"}
    found, start = {}, 0
    for name, kind, shape in table["entries"]:
        kind = np.dtype(kinds[kind])
        stop = start + kind.itemsize * math.prod(shape)
        found[name] = stored["clipquant.data"][start:stop].view(kind).reshape(shape)
        start = stop
    assert start == len(stored["clipquant.data"])
    return found


def written(tmp_path: Path, bits: int) -> tuple[QuantizationReport, Path, nn.Module]:
    model = Net()
    quantized = quantize(model, bits).reported(
        float_metrics={"acc": 0.91, "loss": 0.5},
        quantized_metrics={"acc": 0.9, "loss": math.nan},
        monitor="acc",
        mode="max",
        seed=7,
        calibration="none",
        budget=Budget(0.02, 9000, (Trial(9000, 0.9, chosen=True), Trial(99, 0.1, "uniform"))),
    )
    path = quantized.save(tmp_path / "model.safetensors")
    return quantized.report, path, model


@pytest.mark.parametrize("bits", [2, 8])
def test_read_back_is_what_was_written(tmp_path: Path, bits: int) -> None:
    report, path, _ = written(tmp_path, bits)
    held = read_artifact(path)
    read = report_of(held.weights, held.metadata, path.stat().st_size, str(path))
    assert read.size_bytes == report.size_bytes == path.stat().st_size
    assert (read.float_bytes, read.bits_per_weight) == (report.float_bytes, report.bits_per_weight)
    assert read.float_metrics == report.float_metrics
    assert read.quantized_metrics["acc"] == 0.9
    assert math.isnan(read.quantized_metrics["loss"])
    assert (read.monitor, read.mode, read.seed) == ("acc", "max", 7)
    assert read.environment == report.environment
    assert read.left == report.left
    assert read.budget is not None
    assert report.budget is not None
    assert read.budget.trials[0] == Trial(path.stat().st_size, 0.9, chosen=True)
    assert read.budget.trials[1] == report.budget.trials[1]
    for mine, theirs in zip(read.layers, report.layers, strict=True):
        assert mine.sqnr_db == pytest.approx(theirs.sqnr_db, rel=1e-5)
        assert mine.histogram is not None
        assert theirs.histogram is not None
        assert mine.histogram.counts == theirs.histogram.counts
        assert mine.histogram.levels == theirs.histogram.levels
        assert replace(mine, sqnr_db=0, histogram=None) == replace(
            theirs, sqnr_db=0, histogram=None
        )


def test_figures_are_those_of_the_file_read_without_this_package(tmp_path: Path) -> None:
    report, path, model = written(tmp_path, 4)
    data = path.read_bytes()
    stored = safetensors.numpy.load(data)
    end = 8 + struct.unpack("<Q", data[:8])[0]
    about = json.loads(json.loads(data[8:end])["__metadata__"]["clipquant"])
    blank = data[:end].replace(about["sha256"].encode(), b"0" * 64) + data[end:]
    held = read_artifact(path)
    read = report_of(held.weights, held.metadata, len(data))
    assert read.sha256 == hashlib.sha256(blank).hexdigest()
    total_bytes, total_weights = 0, 0
    for layer in report.layers:
        weight = dict(model.named_parameters())[layer.name].detach().numpy().astype(np.float64)
        parts = {
            k.removeprefix(f"{layer.name}."): v
            for k, v in stored.items()
            if k.startswith(layer.name)
        }
        assert layer.bytes == sum(part.nbytes for part in parts.values())
        stream = np.unpackbits(parts["q"], bitorder="little")[: 4 * weight.size].reshape(-1, 4)
        codes = (stream * [1, 2, 4, 8]).sum(1).reshape(len(weight), -1)
        values = parts["scale"].astype(np.float64) * (codes - parts["zero"].astype(np.float64))
        noise = ((values - weight.reshape(len(weight), -1)) ** 2).sum()
        assert layer.sqnr_db == pytest.approx(10 * np.log10((weight**2).sum() / noise), abs=1e-3)
        total_bytes, total_weights = total_bytes + layer.bytes, total_weights + weight.size
    assert report.bits_per_weight == pytest.approx(8 * total_bytes / total_weights)
    assert report.float_bytes == sum(p.numel() * 4 for p in model.parameters())
    assert report.size_bytes == len(data)


def test_figures_of_bits_by_row_are_those_of_the_file_read_without_this_package(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(300, 200), nn.ReLU(), nn.Linear(200, 5))
    made = quantize(model, "auto", max_size=45_000, data=[torch.randn(200, 300)])
    path = made.save(tmp_path / "rows.safetensors")
    stored = tensors_of(path)
    held = read_artifact(path)
    read = report_of(held.weights, held.metadata, path.stat().st_size)
    for layer, again in zip(made.report.layers, read.layers, strict=True):
        weight = dict(model.named_parameters())[layer.name].detach().double().numpy()
        q, bits, scale, zero = (stored[f"{layer.name}.{k}"] for k in ("q", "bits", "scale", "zero"))
        columns, start, noise = weight.shape[1], 0, 0.0
        for row, width in enumerate(bits.tolist()):
            size = -(-width * columns // 8)
            stream = np.unpackbits(q[start : start + size], bitorder="little")
            codes = stream[: width * columns].reshape(columns, -1) @ (1 << np.arange(width))
            values = scale[row].astype(np.float64) * (codes - zero[row].astype(np.float64))
            noise += ((values - weight[row]) ** 2).sum()
            start += size
        assert start == len(q)
        assert layer.bytes == sum(part.nbytes for part in (q, bits, scale, zero))
        assert layer.bits == again.bits == pytest.approx(bits.mean())
        assert layer.rows == again.rows == {w: int((bits == w).sum()) for w in np.unique(bits)}
        assert layer.sqnr_db == pytest.approx(10 * np.log10((weight**2).sum() / noise), abs=1e-3)
        assert again.sqnr_db == pytest.approx(layer.sqnr_db, abs=1e-3)
        assert again.sensitivity == pytest.approx(layer.sensitivity, rel=1e-4)
    assert made.report.size_bytes == read.size_bytes == path.stat().st_size <= 45_000
    assert [t.size_bytes for t in read.budget.trials if t.chosen] == [read.size_bytes]


def test_a_small_file_keeps_the_figures_and_leaves_the_details_to_the_report(
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    made = quantize(nn.Linear(30, 16), 4).reported(
        float_metrics={"acc": 0.91},
        quantized_metrics={"acc": 0.9},
        monitor="acc",
        mode="max",
        budget=Budget(0.02, None, (Trial(99, 0.9, chosen=True),), "why"),
        failures=("exporting failed",),
    )
    path = made.save(tmp_path / "small.safetensors")
    held = read_artifact(path)
    read = report_of(held.weights, held.metadata, path.stat().st_size)
    assert (read.drop, read.failures) == (pytest.approx(0.01), ("exporting failed",))
    trials = (Trial(path.stat().st_size, 0.9, chosen=True),)
    assert read.budget == Budget(0.02, None, trials, "why")
    assert math.isnan(read.layers[0].sqnr_db)
    assert "details" not in read_metadata(path)


def test_texts_too_long_for_a_file_are_cut(tmp_path: Path) -> None:
    made = quantize(nn.Linear(4, 4), 4).reported(calibration="x" * 9000)
    held = read_artifact(made.save(tmp_path / "long.safetensors"))
    assert held.metadata.report is not None
    assert held.metadata.report.calibration == "x" * 997 + "..."


def test_a_file_without_a_report_still_gives_sizes_and_bits(tmp_path: Path) -> None:
    quantized = quantize(Net(), 3)
    path = save_artifact(quantized.weights, tmp_path / "bare.safetensors")
    held = read_artifact(path)
    read = report_of(held.weights, held.metadata, path.stat().st_size)
    assert [layer.bits for layer in read.layers] == [3.0, 3.0, 3.0]
    assert all(math.isnan(layer.sqnr_db) for layer in read.layers)
    assert read.float_metrics == {}
    assert read.budget is None


def test_the_report_takes_little_of_the_file() -> None:
    report = quantize(Net(), 8).report
    assert len(json.dumps(describe(report))) < 400 + 130 * len(report.layers)
