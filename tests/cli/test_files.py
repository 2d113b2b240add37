"""inspect, verify, report and compare, from files alone."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest
import torch
from torch import nn

import clipquant
from clipquant import quantize
from clipquant.cli import main


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(64, 10))
    path = tmp_path_factory.mktemp("file") / "net.safetensors"
    quantize(net, bits=4, overrides={"0.weight": 8}).save(path)
    return path


@pytest.fixture(params=["rich", "plain"])
def screen(request, monkeypatch):
    if request.param == "plain":
        monkeypatch.setattr("clipquant.report.table.find_spec", lambda name: None)
    return request.param


def flip_byte(path, position):
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_inspect_lists_every_tensor(artifact, screen, capsys):
    assert main(["inspect", str(artifact)]) == 0
    out = capsys.readouterr().out
    cells = {
        line.replace("│", " ").split()[0]: line.replace("│", " ").split()[1:]
        for line in out.splitlines()
        if line.strip()
    }
    # 36 codes of 8 bits and 4 scales; 640 codes of 4 bits and 10 scales; the scales are float32.
    assert cells["0.weight"] == ["4x1x3x3", "8", str(36 + 4 * 4)]
    assert cells["2.weight"] == ["10x64", "4", str(320 + 10 * 4)]
    assert cells["0.bias"] == ["4", "float32", "16"]
    assert cells["2.bias"] == ["10", "float32", "40"]
    assert f"{artifact.stat().st_size:,} bytes in all" in out
    assert f"clipquant {clipquant.__version__}" in out


def test_inspect_names_tied_weights(tmp_path, capsys):
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[1].weight = net[0].weight
    quantize(net).save(tmp_path / "tied.safetensors")
    assert main(["inspect", str(tmp_path / "tied.safetensors")]) == 0
    assert "tied to 0.weight" in capsys.readouterr().out


def test_verify_says_ok(artifact, capsys):
    assert main(["verify", str(artifact)]) == 0
    assert capsys.readouterr().out == f"{artifact}: ok\n"


def test_verify_says_what_is_damaged(artifact, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(artifact.read_bytes())
    flip_byte(path, -1)
    assert main(["verify", str(path)]) == 1
    out = capsys.readouterr().out
    assert f"{path} is damaged" in out
    assert "weight" in out or "bias" in out
    path.write_bytes(artifact.read_bytes()[:-7])
    assert main(["verify", str(path)]) == 1
    assert "damaged" in capsys.readouterr().out


def test_inspect_refuses_a_damaged_file(artifact, tmp_path, capsys):
    path = tmp_path / "net.safetensors"
    path.write_bytes(artifact.read_bytes())
    flip_byte(path, len(path.read_bytes()) // 2)
    assert main(["inspect", str(path)]) == 1
    assert "damaged" in capsys.readouterr().err


def test_report_and_compare_from_files_alone(tmp_path, capsys, monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 96), nn.ReLU(), nn.Linear(96, 6)).eval()
    x = torch.randn(400, 40)
    right = model(x).argmax(1)

    def score(network):
        return float((network(x).argmax(1) == right).float().mean())

    auto = quantize(model, "auto", max_size=6000, data=list(x.split(100)), score=score)
    auto = auto.save(tmp_path / "a.safetensors")
    plain = quantize(model, 8).save(tmp_path / "b.safetensors")
    assert main(["report", str(auto)]) == 0
    out = capsys.readouterr().out
    assert "Budget met" in out
    assert "score (monitored)" in out
    assert main(["report", str(auto), "--html", str(tmp_path / "a.html")]) == 0
    assert "Budget met" in (tmp_path / "a.html").read_text()
    opened: list[str] = []
    monkeypatch.setattr(webbrowser, "open", lambda url: opened.append(url) is None)
    assert main(["report", str(auto), "--open"]) == 0
    assert main(["report", str(auto), "--html", str(tmp_path / "b.html"), "--open"]) == 0
    pages = [Path(unquote(urlparse(url).path)) for url in opened]
    assert pages[1] == tmp_path / "b.html"
    assert all("Budget met" in page.read_text() for page in pages)
    monkeypatch.setattr(webbrowser, "open", lambda url: False)
    capsys.readouterr()
    assert main(["report", str(auto), "--html", str(tmp_path / "b.html"), "--open"]) == 1
    assert f"open {tmp_path / 'b.html'} yourself" in capsys.readouterr().err
    assert main(["compare", str(auto), str(plain)]) == 0
    assert f"{plain.stat().st_size:,}" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "none")]) == 1
