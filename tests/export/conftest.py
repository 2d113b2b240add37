"""A small model with every layer kind that an export treats in its own way."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from clipquant.export import Example


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
