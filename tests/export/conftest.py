"""A small model with every layer kind that an export treats in its own way."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from clipquant.export import Example
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe


class Zoo(nn.Module):
    """Embedding tied to the decoder, linear layers before and after, plain and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.conv = nn.Conv1d(16, 12, 3, padding=1)
        self.up = nn.ConvTranspose1d(12, 16, 3, padding=1)
        self.norm = nn.LayerNorm(16)
        self.linear = nn.Linear(16, 16)
        self.pooled = nn.Linear(16, 5)
        self.decoder = nn.Linear(16, 20, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids):
        h = self.up(torch.relu(self.conv(self.embedding(ids).transpose(1, 2)))).transpose(1, 2)
        h = self.norm(h + self.linear(h))
        return {"logits": self.decoder(h), "pooled": self.pooled(h.mean(1))}


@pytest.fixture
def zoo():
    torch.manual_seed(0)
    return Zoo().eval()


@pytest.fixture
def ids():
    return Example((torch.randint(0, 20, (4, 7), generator=torch.Generator().manual_seed(0)),))


class EveryWidth(nn.Module):
    """An embedding, a convolution and a linear layer of each width from 1 to 8 bits, an output of each."""

    def __init__(self):
        super().__init__()
        widths = range(1, 9)
        self.embedding = nn.ModuleDict({str(b): nn.Embedding(11, 12) for b in widths})
        self.conv = nn.ModuleDict({str(b): nn.Conv1d(12, 6, 2) for b in widths})
        self.linear = nn.ModuleDict({str(b): nn.Linear(12, 5) for b in widths})

    def forward(self, ids):
        outputs = {}
        for b, embedding in self.embedding.items():
            h = outputs[f"embedding{b}"] = embedding(ids)
            outputs[f"conv{b}"] = self.conv[b](h.transpose(1, 2))
            outputs[f"linear{b}"] = self.linear[b](h)
        return outputs


@pytest.fixture(params=["channel", 5], ids=["channels", "groups"])
def every_width(request):
    """The model and its weights, each layer's of its own width."""
    torch.manual_seed(0)
    model = EveryWidth().eval()
    overrides = {f"*.{b}.weight": b for b in range(1, 9)}
    weights = quantize_weights(
        model, Recipe(granularity=request.param, method="rtn", overrides=overrides)
    )
    assert [t.bits for t in weights.tensors.values()] == [*range(1, 9)] * 3
    return model, weights


@pytest.fixture
def run_without():
    """Run Python source in a process where some packages cannot be imported."""

    def run(source: str, *packages: str) -> str:
        block = f"import sys\nfor name in {packages!r}: sys.modules[name] = None\n"
        done = subprocess.run(
            [sys.executable, "-I", "-c", block + source],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
