"""Which method keeps the accuracy at which width: TwoConvNet on the Fashion-MNIST test set.

    python benchmarks/quantize_quality.py CHECKPOINT [--bits 8 4 3 2] [--methods rtn mse hqq gptq]

CHECKPOINT is a state dict (`torch.save(net.state_dict(), CHECKPOINT)`) or a checkpoint of a Trainer. Nothing is
trained and no label is used: gptq is calibrated on 1,024 training images.
"""

import argparse
import copy
import time

import torch

from clipquant import TwoConvNet, quantize
from clipquant.reference import FashionMNIST

CALIBRATION_IMAGES = 1024


def accuracy(net, loader):
    net.eval()
    with torch.inference_mode():
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in loader)
    return right / len(loader.dataset)


def calibration(loader):
    batches, images = [], 0
    torch.manual_seed(0)
    for batch in loader:
        batches.append(batch[0])
        images += len(batch[0])
        if images >= CALIBRATION_IMAGES:
            return batches
    return batches


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--methods", nargs="+", default=["rtn", "mse", "hqq", "gptq"])
    args = parser.parse_args()

    state = torch.load(args.checkpoint, map_location="cpu", weights_only=True)
    net = TwoConvNet().eval()
    net.load_state_dict(state.get("state_dict", state))
    data = FashionMNIST()
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    test, batches = data.test_dataloader(), calibration(data.train_dataloader())
    own = accuracy(net, test)
    print("| bits | method | file, bytes | accuracy, % | drop, points | seconds |")
    print("|---:|---|---:|---:|---:|---:|")
    print(f"| 32 | float | {sum(t.nbytes for t in net.state_dict().values()):,} | {own:.2%} | | |")
    for bits in args.bits:
        for method in args.methods:
            start = time.perf_counter()
            found = quantize(net, bits, method=method, data=batches if method == "gptq" else None)
            seconds = time.perf_counter() - start
            kept = accuracy(found.apply_to(copy.deepcopy(net)), test)
            print(
                f"| {bits} | {method} | {found.report.size_bytes:,} | {kept:.2%} | "
                f"{100 * (own - kept):.2f} | {seconds:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
