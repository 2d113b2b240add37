"""Exported files side by side: size, memory and latency, what runs being interleaved."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from clipquant.export.example import ExportError
from clipquant.export.formats import FORMATS
from clipquant.export.parts.format import Calls, Format
from clipquant.export.parts.timing import interleaved_medians


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
    """Return size, memory and latency of exported files, timed in turn on zeros.

    Args:
        paths: Files whose names end as those of a format that can be run here.
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
        opened = {file: open_file(file, threads) for file in files}
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


def open_file(path: Path, threads: int) -> Calls:
    """Return what runs a file on zeros of a batch size."""
    if not path.is_file():
        raise ExportError(f"{path} is no file: pass {' and '.join(_endings())} files.")
    chosen = _format_of(path)
    chosen.require()
    return chosen.open(path, threads)


def _format_of(path: Path) -> Format:
    """Return the format with the longest suffix that a file's name ends with."""
    fitting = [f for f in FORMATS.values() if f.opens and path.name.endswith(f.suffix)]
    if not fitting:
        raise ExportError(f"{path} ends in neither {' nor '.join(_endings())}: export it first.")
    return max(fitting, key=lambda f: len(f.suffix))


def _endings() -> list[str]:
    return sorted({Path(f"x{f.suffix}").suffix for f in FORMATS.values() if f.opens})


_MEASURE = """
import gc, sys
sys.path[:0] = {path!r}
from importlib import import_module
from pathlib import Path
from clipquant.export.bench import open_file
for name in {needs!r}: import_module(name)
def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * {page}
before = resident()
call = open_file(Path({file!r}), {threads})({batch})
if call is not None: call()
print(resident() - before)
"""


def _resident(file: Path, batch: int, threads: int) -> int | None:
    """Return what a fresh process holds more once the file is open and has run."""
    if not sys.platform.startswith("linux"):
        return None
    import resource

    source = _MEASURE.format(
        path=sys.path,
        needs=_format_of(file).needs,
        page=resource.getpagesize(),
        file=str(file),
        threads=threads,
        batch=batch,
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=False
    )
    return int(done.stdout) if done.returncode == 0 else None
