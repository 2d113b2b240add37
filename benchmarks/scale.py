"""What quantizing, writing and loading cost as a network grows, and what calibration costs as it gets deeper.

    python benchmarks/scale.py [--millions 10 30 100] [--methods rtn mse hqq] [--depths 12 24 48] [--plot FILE.png]

Sizes: a stack of Linear layers of random weights, 4 bits, each measured in a process of its own: seconds of the
processor, and the most memory that was resident beyond the float model. The slope is that of the logarithms of time
and size: 1 where time is linear. Depths: transformers of width 64, `gptq` on four batches: calls of each layer for
a batch, and seconds. `--millions 0` and `--depths 0` leave a part out.
"""

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from clipquant import load_quantized, quantize

WIDTH = 2048


def stack(millions):
    """Return Linear layers with so many million weights, of random values."""
    count = max(round(millions * 1e6 / WIDTH**2), 1)
    with torch.device("meta"):
        net = nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(count)))
    net.to_empty(device="cpu")
    for layer in net:
        nn.init.normal_(layer.weight, std=0.02)
    return net.eval()


def peak():
    """Return the most bytes that were resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measured(work):
    """Return what some work gives, its processor seconds, and the peak after it."""
    start = time.process_time()
    made = work()
    return made, time.process_time() - start, peak()


def one_size(millions, method):
    """Return the figures of one size, as a dict."""
    torch.manual_seed(0)
    net = stack(millions)
    floats = peak()
    made, quantizing, after = measured(lambda: quantize(net, 4, method=method, progress=False))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        _, writing, written = measured(lambda: made.save(path))
        size = path.stat().st_size
        made = None
        _, loading, _ = measured(lambda: load_quantized(path, net))
    return {
        "millions": sum(p.numel() for p in net.parameters()) / 1e6,
        "method": method,
        "quantize_s": quantizing,
        "save_s": writing,
        "load_s": loading,
        "file_mb": size / 1e6,
        "quantize_mb": (after - floats) / 1e6,
        "save_mb": (written - floats) / 1e6,
    }


class Block(nn.Module):
    """A layer of a transformer; all count their calls together, in copies too."""

    calls = 0

    def __init__(self, width=64):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.wide, self.back = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        Block.calls += 1
        h = self.norms[0](x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        return x + self.back(nn.functional.gelu(self.wide(self.norms[1](x))))


def one_depth(depth):
    """Return the figures of one depth, as a dict."""
    torch.manual_seed(0)
    net = nn.Sequential(*(Block() for _ in range(depth))).eval()
    data = [torch.randn(8, 32, 64) for _ in range(4)]
    _, seconds, _ = measured(lambda: quantize(net, 4, method="gptq", data=data, progress=False))
    return {"depth": depth, "calls": Block.calls / depth / len(data), "seconds": seconds}


def apart(function, *args):
    """Return what a function of this script gives in a process of its own."""
    asked = json.dumps([function.__name__, *args])
    env = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    done = subprocess.run(
        [sys.executable, __file__, "--one", asked],
        capture_output=True,
        text=True,
        check=True,
        env=env,
    )
    return json.loads(done.stdout.splitlines()[-1])


def slope(results, key):
    """Return the slope of a line through the logarithms of size and time, by least squares."""
    points = [(math.log(r["millions"]), math.log(r[key])) for r in results]
    mean_x, mean_y = (sum(p[i] for p in points) / len(points) for i in (0, 1))
    squares = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / squares if squares else math.nan


def sizes(args):
    """Print a table of sizes, and return its figures."""
    print(
        "| weights, million | method | quantize s | write s | load s | file MB | quantizing, MB beyond | writing |"
    )
    print("|---|---|---|---|---|---|---|---|")
    found = []
    for method in args.methods:
        own = []
        for millions in args.millions:
            own.append(r := apart(one_size, millions, method))
            print(
                f"| {r['millions']:.0f} | {method} | {r['quantize_s']:.1f} | {r['save_s']:.1f} | {r['load_s']:.1f} "
                f"| {r['file_mb']:.0f} | {r['quantize_mb']:.0f} | {r['save_mb']:.0f} |",
                flush=True,
            )
        if len(own) > 1:
            print(f"{method}: slope of time {slope(own, 'quantize_s'):.2f}")
        found += own
    return found


def depths(args):
    """Print a table of depths."""
    print("| layers | calls of each for a batch | s | s a layer |")
    print("|---|---|---|---|")
    for depth in args.depths:
        r = apart(one_depth, depth)
        each = r["seconds"] / depth
        print(f"| {depth} | {r['calls']:.0f} | {r['seconds']:.1f} | {each:.2f} |", flush=True)


def plot(results, path):
    """Draw time against size, both on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 3.5))
    for method in dict.fromkeys(r["method"] for r in results):
        own = [r for r in results if r["method"] == method]
        axes.loglog(
            [r["millions"] for r in own], [r["quantize_s"] for r in own], "o-", label=method
        )
    axes.set_xlabel("weights, million")
    axes.set_ylabel("seconds of one core")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--millions", nargs="*", type=float, default=[10, 30, 100])
    parser.add_argument("--methods", nargs="*", default=["rtn", "mse", "hqq"])
    parser.add_argument("--depths", nargs="*", type=int, default=[12, 24, 48])
    parser.add_argument("--plot")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        name, *rest = json.loads(args.one)
        print(json.dumps(globals()[name](*rest)))
        return
    args.millions = [m for m in args.millions if m]
    args.depths = [d for d in args.depths if d]
    if args.millions:
        results = sizes(args)
        if args.plot:
            plot(results, args.plot)
    if args.depths:
        depths(args)


if __name__ == "__main__":
    main()
