"""What clipping costs from one thousand to one hundred million parameters, in 10 to 10,000 tensors: a table and a plot.

Usage: python benchmarks/clip_scale.py [--figure benchmarks/figures/clip_scale.png]. Times are of one thread's work, so
that other programs change them little; the median of interleaved runs, whose order is shuffled.
"""

import argparse
import math
import random
import statistics
import time

import torch
from torch import nn

from clipquant.clip import AGC, Norm, Value
from clipquant.clip.apply import clip_assigned_
from clipquant.clip.assign import assign

SIZES = [10_000, 100_000, 1_000_000, 10_000_000, 100_000_000]
COUNTS = [10, 100, 1_000, 10_000]


def parameters(count, size):
    """Return `count` square matrices of about `size` elements together, and gradients to start from."""
    side = max(1, round(math.sqrt(size / count)))
    params = [nn.Parameter(torch.randn(side, side)) for _ in range(count)]
    for param in params:
        param.grad = torch.empty_like(param)
    return params, [torch.randn_like(param) for param in params]


def contenders(params):
    """Return torch's own clipping and what the callback runs in a step that is not logged, every tensor clipped."""

    def callback(rule):
        assignment = assign(params, rule)
        return lambda: clip_assigned_(assignment, on_nonfinite="skip", later=True)

    return {
        "clip_grad_norm_": lambda: nn.utils.clip_grad_norm_(params, 1.0),
        "clip_grad_value_": lambda: nn.utils.clip_grad_value_(params, 1.0),
        "Norm": callback(Norm(1.0)),
        "Value": callback(Value(1.0)),
        "AGC": callback(AGC(0.01)),
    }


def measure(count, size, rounds):
    """Return the median milliseconds of each contender."""
    params, gradients = parameters(count, size)
    found = contenders(params)
    times = {name: [] for name in found}
    for number in range(rounds + 1):
        names = list(found)
        random.shuffle(names)
        for name in names:
            torch._foreach_copy_([param.grad for param in params], gradients)
            start = time.process_time()
            found[name]()
            if number:
                times[name].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def table(what, rows):
    """Print one row for each measurement."""
    names = list(rows[0][1])
    print(f"\n| {what} | " + " | ".join(names) + " |")
    print("|---:|" + "---:|" * len(names))
    for value, found in rows:
        print(f"| {value:,} | " + " | ".join(f"{found[name]:.3g} ms" for name in names) + " |")


def plot(path, by_size, by_count):
    """Draw both tables on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    labels = ("parameters, in 100 tensors", "tensors, of 1 M parameters together")
    for axis, rows, label in zip(axes, (by_size, by_count), labels, strict=True):
        for name in rows[0][1]:
            style = "--" if name.startswith("clip_") else "-"
            axis.plot([v for v, _ in rows], [found[name] for _, found in rows], style, label=name)
        axis.set(xscale="log", yscale="log", xlabel=label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("milliseconds a step")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    by_size = [(size, measure(100, size, 9 if size < 10**7 else 3)) for size in SIZES]
    table("parameters, in 100 tensors", by_size)
    by_count = [(count, measure(count, 10**6, 5)) for count in COUNTS]
    table("tensors, of 1 M parameters together", by_count)
    if args.figure:
        plot(args.figure, by_size, by_count)


if __name__ == "__main__":
    main()
