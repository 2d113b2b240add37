"""How much memory a model with packed weights takes: 100 M parameters, each width in a process of its own (Linux).

    python benchmarks/packed_memory.py [--bits 8 4 3 2]

Resident memory beyond what the process had before the file was read, as a share of the file. Threads, kernels and
imports that a small model takes too are paid before.
"""

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from clipquant import load_quantized, quantize

LAYERS, SIDE, SMALL = 24, 2048, 512


def make(layers, side):
    return nn.Sequential(*(nn.Linear(side, side) for _ in range(layers)))


def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def resident():
    gc.collect()
    return status("VmRSS")


@torch.no_grad()
def measure(path, small):
    """Print the shares after loading, after a pass of each batch size, and the highest of the passes."""
    like = load_quantized(small, make(1, SMALL), packed=True)
    for batch in (1, 32):
        like(torch.randn(batch, SMALL))
    nn.Linear(SIDE, SIDE)(torch.zeros(32, SIDE))
    with torch.device("meta"):
        model = make(LAYERS, SIDE)
    before, size = resident(), Path(path).stat().st_size
    load_quantized(path, model, packed=True)
    shares = [(resident() - before) / size]
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    times = []
    for batch in (1, 32):
        x = torch.zeros(batch, SIDE)
        start = time.perf_counter()
        model(x)
        times.append(1e3 * (time.perf_counter() - start))
        shares.append((resident() - before) / size)
    shares.append((status("VmHWM") - before) / size)
    print(*(f"{share:.3f}" for share in shares), *(f"{ms:.0f}" for ms in times), sep=" | ")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(2)
    if args.measure:
        measure(*args.measure)
        return
    print(
        "| bits | file, bytes | loaded | after batch 1 | after batch 32 | peak | ms, 1 | ms, 32 |"
    )
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for bits in args.bits:
            paths = [f"{folder}/{name}" for name in ("model", "small")]
            for path, model in zip(paths, (make(LAYERS, SIDE), make(1, SMALL)), strict=True):
                quantize(model, bits, method="rtn").save(path)
            command = [sys.executable, __file__, "--measure", *paths]
            found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            print(f"| {bits} | {Path(paths[0]).stat().st_size:,} | {found.strip()} |", flush=True)


if __name__ == "__main__":
    main()
