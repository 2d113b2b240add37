"""Budgets on Fashion-MNIST: what bits="auto" finds for three sizes and two drops, beside one width for all weights.

    python benchmarks/budgets.py CHECKPOINT     # a TwoConvNet's state dict, or a Lightning checkpoint of it

Judged on the 10,000 test images; sensitivities from 16 batches of 64 training images, without labels.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

from clipquant import TwoConvNet, quantize
from clipquant.reference import FashionMNIST
from clipquant.report.table import print_table

SIZES = ("600kB", "450kB", "300kB")
DROPS = (0.002, 0.01)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
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
    def accuracy(net: nn.Module) -> float:
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in tests)
        return right / sum(len(y) for _, y in tests)

    rows = [
        (
            "float",
            f"{sum(t.nbytes for t in model.state_dict().values()):,}",
            f"{accuracy(model):.2%}",
        )
    ]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        asked = [{"max_size": size} for size in SIZES] + [{"max_drop": drop} for drop in DROPS]
        for budget in asked:
            made = quantize(model, "auto", data=inputs, score=accuracy, **budget)
            size = made.save(path).stat().st_size
            said = ", ".join(f"{name}={value}" for name, value in budget.items())
            rows.append((said, f"{size:,}", f"{made.report.quantized_metrics['score']:.2%}"))
        for bits in (4, 3, 2):
            made = quantize(model, bits, data=inputs)
            size = made.save(path).stat().st_size
            rows.append(
                (
                    f"{bits} bits for all",
                    f"{size:,}",
                    f"{accuracy(made.apply_to(copy.deepcopy(model))):.2%}",
                )
            )
    print_table(
        "Budgets, TwoConvNet on Fashion-MNIST",
        ("asked", "bytes of the file", "test accuracy"),
        rows,
    )


if __name__ == "__main__":
    main()
