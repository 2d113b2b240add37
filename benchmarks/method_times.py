"""How long each method takes for networks of 1, 20 and 100 million parameters: README's table of methods.

    python benchmarks/method_times.py

Each figure is one `quantize(model, bits=4)` of linear layers with ReLU between them, 16 batches of 32 rows, in
a process of its own, on two threads. A method that is not through after `--limit` seconds is stopped.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

SIZES = {"1 M": (512, 4), "20 M": (1024, 20), "100 M": (2048, 24)}
METHODS = ("rtn", "mse", "hqq", "gptq", "adaround", "distill")
CHILD = """
import sys, time, torch
from torch import nn
from clipquant import quantize
width, depth, method = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
torch.set_num_threads(2)
torch.manual_seed(0)
layers = [part for _ in range(depth) for part in (nn.Linear(width, width), nn.ReLU())]
model = nn.Sequential(*layers).eval()
data = [torch.randn(32, width) for _ in range(16)]
started = time.perf_counter()
quantize(model, bits=4, method=method, data=data, progress=False)
print(time.perf_counter() - started)
"""


def taken(width: int, depth: int, method: str, limit: float) -> str:
    """Return how long one run took, as the table shows it."""
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(width), str(depth), method]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"over {limit:.0f} s"
    if done.returncode:
        raise SystemExit(done.stderr)
    seconds = float(done.stdout.split()[-1])
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one run")
    asked = parser.parse_args()
    print("| method | " + " | ".join(SIZES) + " |")
    print("|---|" + "---:|" * len(SIZES))
    for method in asked.methods:
        cells = [taken(*size, method, asked.limit) for size in SIZES.values()]
        print(f"| `{method}` | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
