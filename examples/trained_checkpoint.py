"""Quantizes a checkpoint that is already trained, without a Trainer: load, quantize, save, load again.

    clipquant fit --config examples/quickstart.yaml
    python examples/trained_checkpoint.py lightning_logs/version_0/checkpoints/*.ckpt

`clipquant quantize --config examples/quickstart.yaml --ckpt_path CHECKPOINT` does the same from the command line.
It prints the report, the size of the file, and the accuracy before and after.
"""

import sys
from pathlib import Path

import torch

from clipquant import TwoConvNet, load_quantized, quantize
from clipquant.reference import MNIST5k


def accuracy(net, batches):
    """Return the share of images that are told right."""
    with torch.inference_mode():
        right = [net(images).argmax(1) == labels for images, labels in batches]
    return torch.cat(right).float().mean().item()


def main(checkpoint, folder=".", method="auto"):
    """Quantize a checkpoint of TwoConvNet to 3 bits; return the accuracy before and after."""
    data = MNIST5k()
    data.setup("fit")
    net = TwoConvNet.load_from_checkpoint(checkpoint, map_location="cpu").eval()
    images = [batch for batch, _ in data.train_dataloader()][
        :16
    ]  # what methods see; no labels needed
    small = quantize(net, bits=3, method=method, data=images)
    path = small.save(Path(folder, "model.safetensors"))
    again = load_quantized(path, TwoConvNet()).eval()
    held = list(data.val_dataloader())
    before, after = accuracy(net, held), accuracy(again, held)
    print(small.report)
    print(f"{path}: {path.stat().st_size:,} bytes; accuracy {before:.3f} before, {after:.3f} after")
    return before, after


if __name__ == "__main__":
    main(sys.argv[1])
