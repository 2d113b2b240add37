"""Budgets on Fashion-MNIST: what bits="auto" finds for sizes and drops, beside one width for all weights.

    python benchmarks/budgets.py CHECKPOINT     # a TwoConvNet's state dict, or a Lightning checkpoint of it
    python benchmarks/budgets.py CHECKPOINT --only max_drop=0.01 3     # one budget, one uniform width

Judged on the 10,000 test images, with the standard error of each drop; sensitivities and codes from 16 batches of 64
training images, without labels. For each uniform width the table has the best of all methods, on the same images.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from clipquant import QuantizedModel, TwoConvNet, quantize
from clipquant.quant.recipe import METHODS
from clipquant.reference import FashionMNIST
from clipquant.report.table import print_table

SIZES = ("600kB", "450kB", "300kB", "200kB", "150kB")
DROPS = (0.002, 0.01)
WIDTHS = (5, 4, 3, 2, 1)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    asked: str
    size: int
    accuracy: float
    error: float | None = None  # standard error of the drop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--only", nargs="*", metavar="LINE", help="such as max_drop=0.01 or 3")
    args = parser.parse_args()
    held = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    model = TwoConvNet()
    model.load_state_dict(held.get("state_dict", held))
    model.eval()
    data = FashionMNIST(batch_size=64)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    tests = list(data.test_dataloader())
    torch.manual_seed(0)
    inputs = [x for (x, _), _ in zip(data.train_dataloader(), range(16), strict=False)]

    @torch.no_grad()
    def right(net: nn.Module) -> torch.Tensor:
        net.eval()
        return torch.cat([net(x).argmax(1) == y for x, y in tests])

    def accuracy(net: nn.Module) -> float:
        return float(right(net).double().mean())

    bytes_of_float = sum(t.nbytes for t in model.state_dict().values())
    rows = [Row("float", bytes_of_float, accuracy(model))]
    show(rows[-1], rows[0].accuracy)
    asked = [{"max_size": size} for size in SIZES] + [{"max_drop": drop} for drop in DROPS]
    for budget in asked:
        said = ", ".join(f"{name}={value}" for name, value in budget.items())
        if args.only and said not in args.only:
            continue
        made = quantize(model, "auto", data=inputs, score=right, **budget)
        report = made.report
        value = report.quantized_metrics["score"]
        rows.append(Row(said, file_bytes(made), value, report.drop_error))
        show(rows[-1], rows[0].accuracy)
    for width in WIDTHS:
        if args.only and str(width) not in args.only:
            continue
        rows.append(best_uniform(model, width, inputs, accuracy))
        show(rows[-1], rows[0].accuracy)
    print_table(
        "Budgets, TwoConvNet on Fashion-MNIST",
        ("asked", "bytes of the file", "test accuracy", "drop, points"),
        [cells(row, rows[0].accuracy) for row in rows],
    )


def best_uniform(
    model: nn.Module, width: int, inputs: list[torch.Tensor], accuracy: Callable[[nn.Module], float]
) -> Row:
    """Return the most accurate file of one width for all weights, of every method."""
    found = []
    for method in METHODS:
        if method == "auto":
            continue
        made = quantize(model, width, method=method, data=inputs)
        value = accuracy(made.apply_to(copy.deepcopy(model)))
        found.append(Row(f"{width} bits for all, {method}", file_bytes(made), value))
    return max(found, key=lambda row: row.accuracy)


def file_bytes(made: QuantizedModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return made.save(Path(folder) / "model.safetensors").stat().st_size


def cells(row: Row, before: float) -> tuple[str, ...]:
    return (
        row.asked,
        f"{row.size:,}",
        f"{row.accuracy:.2%}",
        f"{100 * (before - row.accuracy):.2f}"
        + (f" +- {100 * row.error:.2f}" if row.error is not None else ""),
    )


def show(row: Row, before: float) -> None:
    print("  ".join(cells(row, before)), flush=True)


if __name__ == "__main__":
    main()
