"""A fit whose file holds its codes in an entropy code."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from callbacks.test_quantize import Small, fit

from clipquant import QuantizeOnFitEnd, load_quantized
from clipquant.artifact import read_metadata, read_outline
from clipquant.callbacks import fit_end
from clipquant.errors import ArgumentError, MissingPackageError

pytest.importorskip("constriction")


class Sparse(Small):
    """Of its many weights nine in ten are zero, and stay so."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 10))
        self.masks = [(torch.rand_like(p) < 0.1).float() for p in self.parameters() if p.dim() > 1]
        for p, mask in zip(self._wide(), self.masks, strict=True):
            p.data *= mask

    def _wide(self):
        return [p for p in self.parameters() if p.dim() > 1]

    def on_before_optimizer_step(self, optimizer):
        for p, mask in zip(self._wide(), self.masks, strict=True):
            p.grad *= mask


def test_the_file_holds_what_the_module_holds_in_fewer_bytes(tmp_path):
    callback = QuantizeOnFitEnd(3, coding="entropy", dirpath=tmp_path)
    _, model = fit(callback, tmp_path, Sparse())
    assert read_metadata(callback.artifact_path)["format_version"] == 3
    assert callback.report.size_bytes == callback.artifact_path.stat().st_size
    last = callback.report.layers[0]
    assert last.coded_bits < 1.2 < last.bits
    state, own = load_quantized(callback.artifact_path), model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in state.items())


def test_a_budget_counts_coded_bytes_and_pruned_zeros_stay(tmp_path):
    callback = QuantizeOnFitEnd("auto", max_size="6kB", coding="entropy", dirpath=tmp_path)
    _, model = fit(callback, tmp_path, Sparse())
    assert not callback.report.failures
    assert 4_500 < callback.artifact_path.stat().st_size <= 6_000
    tensors = read_outline(callback.artifact_path).weights.tensors
    assert any(tensor.stream is not None for tensor in tensors.values())
    for weight, mask in zip(model._wide(), model.masks, strict=True):
        assert not weight[mask == 0].any()
        assert weight[mask == 1].any()


def test_what_fails_leaves_dense_codes_and_says_so(tmp_path, monkeypatch):
    def coded(self, coding):
        raise RuntimeError("no coder")

    monkeypatch.setattr(fit_end.QuantizedModel, "coded", coded)
    callback = QuantizeOnFitEnd(3, coding="entropy", dirpath=tmp_path)
    with pytest.warns(UserWarning, match="entropy coding"):
        fit(callback, tmp_path, Sparse())
    assert "no coder" in callback.report.failures[0]
    assert read_metadata(callback.artifact_path)["format_version"] == 2


def test_what_cannot_be_is_refused_before_training(monkeypatch):
    with pytest.raises(ArgumentError, match="coding must be one of"):
        QuantizeOnFitEnd(3, coding="zip")
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(MissingPackageError, match=r"clipquant\[entropy\]"):
        QuantizeOnFitEnd(3, coding="entropy")
