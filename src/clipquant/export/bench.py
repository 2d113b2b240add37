"""Latency side by side: what runs is interleaved, so that a busy machine slows all of it alike."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from clipquant.export.example import Example, ExportError

REPEATS = 50
_SLOW = 0.5  # seconds a call from which fewer repeats must do
_WARMUP = 3


def interleaved_medians(
    calls: Mapping[str, Callable[[], object]], repeats: int = REPEATS
) -> dict[str, float]:
    """Return the median time of each call in milliseconds, all measured in turn.

    Args:
        calls: Name -> what to time.
        repeats: Times that each is run; ten for calls of half a second or more.

    >>> sorted(interleaved_medians({"a": list, "b": dict}, repeats=3))
    ['a', 'b']
    """
    slowest = max((_seconds(call) for call in calls.values()), default=0.0)
    if slowest > _SLOW:
        repeats = min(repeats, 10)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + _WARMUP):
        for name, call in calls.items():
            spent = _seconds(call)
            if turn >= _WARMUP:
                times[name].append(spent)
    return {name: 1e3 * statistics.median(spent) for name, spent in times.items()}


def _seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclass(frozen=True)
class Measured:
    """One file on this machine.

    Args:
        path: The file.
        bytes: Its size.
        resident: Bytes that a fresh process holds more once the file is open and has run; None
            where the system does not tell.
        latency: Batch size -> median milliseconds; empty where the file fixes another size.
    """

    path: str
    bytes: int
    resident: int | None
    latency: Mapping[int, float]


def bench_files(
    paths: Iterable[str | Path], batches: Sequence[int] = (1, 32), threads: int = 1
) -> list[Measured]:
    """Return size, memory and latency of `.onnx` and `.pt2` files, timed in turn on zeros.

    Args:
        paths: Files with these endings.
        batches: Batch sizes.
        threads: Threads of one operator.

    Raises:
        ExportError: For another ending, or a size other than the batch that the file leaves open.
        OSError: If a file cannot be read.
    """
    files = [Path(path) for path in paths]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        opened = {file: _open(file, threads) for file in files}
        latency: dict[Path, dict[int, float]] = {file: {} for file in files}
        for batch in batches:
            calls = {
                str(f): call for f, make in opened.items() if (call := make(batch)) is not None
            }
            medians = interleaved_medians(calls)
            for file in files:
                if str(file) in medians:
                    latency[file][batch] = medians[str(file)]
    finally:
        torch.set_num_threads(before)
    return [
        Measured(str(f), f.stat().st_size, _resident(f, batches[0], threads), latency[f])
        for f in files
    ]


Maker = Callable[[int], "Callable[[], Any] | None"]


def _open(path: Path, threads: int) -> Maker:
    """Return a function from a batch size to a call that runs the file; None for a fixed size."""
    if not path.is_file():
        raise ExportError(f"{path} is no file: pass .onnx and .pt2 files.")
    if path.suffix == ".onnx":
        return _open_onnx(path, threads)
    if path.suffix == ".pt2":
        return _open_pt2(path)
    raise ExportError(f"{path} ends in neither .onnx nor .pt2: export it first.")


def _open_onnx(path: Path, threads: int) -> Maker:
    import numpy as np

    from clipquant.export.onnx import open_any, require_onnx

    require_onnx()
    session = open_any(path, threads)
    kinds: dict[str, Any] = {
        "tensor(float)": np.float32,
        "tensor(int64)": np.int64,
        "tensor(float16)": np.float16,
    }
    kinds |= {"tensor(double)": np.float64, "tensor(int32)": np.int32, "tensor(bool)": np.bool_}

    def make(batch: int) -> Callable[[], Any] | None:
        fed = {}
        for given in session.get_inputs():
            first, *rest = given.shape or [None]
            if any(not isinstance(size, int) for size in rest):
                raise ExportError(
                    f"{path} leaves more than the batch open: {given.name} {given.shape}."
                )
            if isinstance(first, int) and first != batch:
                return None
            shape = [batch, *rest] if given.shape else []
            fed[given.name] = np.zeros(shape, kinds[given.type])
        return partial(session.run, None, fed)

    return make


def _open_pt2(path: Path) -> Maker:
    program = torch.export.load(path)
    module = program.module()
    args, kwargs = program.example_inputs or ((), {})
    example = Example(args, kwargs)
    fixed = not program.range_constraints

    def make(batch: int) -> Callable[[], Any] | None:
        if fixed and batch != example.batch_size:
            return None
        return partial(example.resized(batch).run, module)

    return make


_MEASURE = """
import gc, sys
sys.path[:0] = {path!r}
from pathlib import Path
from clipquant.export.bench import _open
{warm}
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * {page}
before = resident()
call = _open(Path({file!r}), {threads})({batch})
if call is not None: call()
print(resident() - before)
"""


def _resident(file: Path, batch: int, threads: int) -> int | None:
    """Return what a fresh process holds more once the file is open and has run."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    warm = "import onnxruntime, numpy" if file.suffix == ".onnx" else "import torch.export"
    source = _MEASURE.format(
        path=sys.path,
        warm=warm,
        page=resource.getpagesize(),
        file=str(file),
        threads=threads,
        batch=batch,
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    return int(done.stdout) if done.returncode == 0 else None
