"""Bits by row beside one width for all in files of the same size, on inputs of a kind that calibration did not show.

    python benchmarks/rows.py [NETWORK ...]

Each small network is trained here, calibrated on 16 batches of 4 or 8 samples of a part of its classes or of its range,
and judged on the rest: squared error of its outputs over their variance, float network against quantized.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipquant import quantize
from clipquant.report.table import print_table

WIDTHS = (4, 2)
Batch = tuple[tuple[Tensor, ...], Tensor]  # inputs and targets
Draw = Callable[
    [int, int, int], Batch
]  # of classes from the first to before the second, so many samples


def fitted(model: nn.Module, draw: Draw, loss: Any, classes: int, steps: int) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        inputs, targets = draw(0, classes, 256)
        optimizer.zero_grad()
        loss(model(*inputs), targets).backward()
        optimizer.step()
    return model.eval()


def labels(low: int, high: int, count: int) -> Tensor:
    return torch.randint(low, high, (count,))


def classes() -> tuple[nn.Module, Draw, int, int, int]:
    centres = torch.randn(300, 32) * 1.5

    def draw(low: int, high: int, count: int) -> Batch:
        y = labels(low, high, count)
        return (centres[y] + 0.7 * torch.randn(count, 32),), y

    net = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 300))
    return fitted(net, draw, F.cross_entropy, 300, 600), draw, 40, 300, 4


def pitch() -> tuple[nn.Module, Draw, int, int, int]:
    loudness = torch.logspace(0, -2.5, 80)
    spectra = torch.randn(360, 80).abs() * loudness

    def draw(low: int, high: int, count: int) -> Batch:
        y = labels(low, high, count)
        noise = 0.02 * loudness * torch.randn(count, 80).abs()
        x = spectra[y] * (torch.rand(count, 1) + 0.5) + noise
        return (x,), torch.exp(-(((torch.arange(360)[None] - y[:, None]) / 1.5) ** 2))

    net = nn.Sequential(nn.BatchNorm1d(80), nn.Linear(80, 128), nn.ReLU(), nn.Linear(128, 360))
    return fitted(net, draw, F.binary_cross_entropy_with_logits, 360, 600), draw, 60, 360, 8


class Bag(nn.Module):
    """The mean of some rows of a table, classified."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2000, 48)
        self.head = nn.Sequential(nn.Linear(48, 96), nn.ReLU(), nn.Linear(96, 50))

    def forward(self, rows: Tensor) -> Tensor:
        return self.head(self.table(rows).mean(1))


def table() -> tuple[nn.Module, Draw, int, int, int]:
    kinds = labels(0, 50, 2000)

    def draw(low: int, high: int, count: int) -> Batch:
        rows = torch.randint(low, high, (count, 6))
        return (rows,), torch.mode(kinds[rows], 1).values

    return fitted(Bag(), draw, F.cross_entropy, 2000, 800), draw, 300, 2000, 8


class Recurrent(nn.Module):
    """Two layers of GRU, and the last state classified."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.GRU(20, 64, 2, batch_first=True)
        self.head = nn.Linear(64, 40)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.steps(x)[0][:, -1])


def recurrent() -> tuple[nn.Module, Draw, int, int, int]:
    courses = torch.randn(40, 12, 20)

    def draw(low: int, high: int, count: int) -> Batch:
        y = labels(low, high, count)
        return (courses[y] + 0.5 * torch.randn(count, 12, 20),), y

    return fitted(Recurrent(), draw, F.cross_entropy, 40, 150), draw, 8, 40, 4


class Graph(nn.Module):
    """Three rounds of messages between ten nodes, and their mean classified."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds = nn.ModuleList([nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 64)])
        self.head = nn.Linear(64, 30)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        for layer in self.rounds:
            x = F.relu(layer(edges @ x))
        return self.head(x.mean(1))


def graph() -> tuple[nn.Module, Draw, int, int, int]:
    centres = torch.randn(30, 16)

    def draw(low: int, high: int, count: int) -> Batch:
        y = labels(low, high, count)
        edges = (torch.rand(count, 10, 10) < 0.3).float() + torch.eye(10)
        x = centres[y][:, None] + torch.randn(count, 10, 16)
        return (x, edges / edges.sum(-1, keepdim=True)), y

    return fitted(Graph(), draw, F.cross_entropy, 30, 300), draw, 6, 30, 4


def error(model: nn.Module, exact: nn.Module, inputs: tuple[Tensor, ...]) -> float:
    with torch.no_grad():
        wanted = exact(*inputs)
        off = model(*inputs) - wanted
    return float(off.square().sum() / (wanted - wanted.mean(0)).square().sum())


NETWORKS = {
    "classes": classes, "pitch": pitch, "table": table, "recurrent": recurrent, "graph": graph,
}  # fmt: skip


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for name in sys.argv[1:] or NETWORKS:
        torch.manual_seed(0)
        model, draw, shown, count, each = NETWORKS[name]()
        data = [draw(0, shown, each)[0] for _ in range(16)]
        fresh = {"shown": draw(0, shown, 1000)[0], "not shown": draw(shown, count, 2000)[0]}
        for width in WIDTHS:
            start = time.process_time()
            plain = quantize(model, width, data=data, progress=False, method="gptq")
            took = time.process_time() - start
            size = plain.report.size_bytes
            by_row = quantize(model, "auto", max_size=size, data=data, progress=False)
            longer = (time.process_time() - start - took) / took
            nets = [made.apply_to(copy.deepcopy(model)).eval() for made in (plain, by_row)]
            off = [f"{error(net, model, x):.4f}" for x in fresh.values() for net in nets]
            sizes = f"{size:,} / {by_row.report.size_bytes:,}"
            rows.append((name, str(width), sizes, *off, f"{longer:.1f}x"))
            print("  ".join(rows[-1]), flush=True)
    head = (
        "network",
        "bits",
        "bytes",
        "shown, one width",
        "by row",
        "not shown, one width",
        "by row",
        "time",
    )
    print_table("Bits by row or one width for all, error of the outputs", head, rows)


if __name__ == "__main__":
    main()
