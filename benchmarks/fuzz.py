"""Files from strangers: kills, flipped bits, truncations and made-up files with right digests.

    python benchmarks/fuzz.py [--inputs 1000000] [--kills 150] [--seed 0] [--seconds S]

Every made-up file comes from a real one of either version: parts of its header, its metadata, its table or its
bytes are replaced, left out, swapped, doubled or grown, and its digests are computed anew, so that what is
behind them is reached. Those that load become the start of others. Whatever is called must return or raise
ArtifactError. The last lines are the table of benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import struct
import tempfile
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from clipquant import load_quantized, quantize
from clipquant.artifact import (
    ArtifactError,
    read_artifact,
    read_metadata,
    read_outline,
    save_artifact,
    verify_artifact,
)
from clipquant.cli import main as command
from clipquant.quant.codes.coding import with_coding
from clipquant.quant.codes.weights import QuantizedWeights
from clipquant.quant.quantize import quantize_weights
from clipquant.quant.recipe import Recipe
from clipquant.report import render_page, report_of

BLANK = "0" * 64
NASTY: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 8, 9, 255, 256, 2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, 2**64, 10**19,
    -(2**63), 0.5, -0.0, 1e308, 1e-320, "", "0", "4", "rows", "tensor", "channel", "float32", "float16", "load", "U8",
    "F16", "F32", "F64", "C64", "BOOL", "F8_E8M0", "I64", "min", "max", "weight", "weight.q", "\x1b[31m", "\u202eabc",
    "\ud800", "a" * 5000, "0" * 64, [], [0], [1, 2], ["a"], [[]], [0, 0], [-1], [2**40, 2**40], [10**6, 10**6],
    [150_000_000, 2], [0, 2**62], {}, {"a": 1}, {"": None}, [[["x"]]], ["a", "b", "c"], [{}, {}],
)  # fmt: skip


@dataclass
class Parts:
    """A file taken apart: its header, its metadata, its table where it has one, its bytes."""

    header: dict[str, Any]
    about: dict[str, Any]
    blob: bytearray
    table: dict[str, Any] | None = None
    raw_tail: str = ""


@dataclass(frozen=True)
class Seed:
    """A real file, and what makes a model that it fits."""

    parts: Parts
    model: Callable[[], nn.Module]


@dataclass
class Outcome:
    """What came of many calls."""

    inputs: int = 0
    calls: int = 0
    loaded: int = 0
    refused: int = 0
    other: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0
    more_mb: float = 0.0
    rules: Counter[str] = field(default_factory=Counter)

    def join_(self, other: Outcome) -> None:
        for name in ("inputs", "calls", "loaded", "refused"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.slowest = max(self.slowest, other.slowest)
        self.more_mb = max(self.more_mb, other.more_mb)
        self.other.update(other.other)
        self.rules.update(other.rules)


def take_apart(data: bytes) -> Parts:
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    about = json.loads(header.pop("__metadata__")["clipquant"])
    blob = bytearray(data[8 + size :])
    if "clipquant.table" not in header:
        return Parts(header, about, blob)
    start, stop = header["clipquant.table"]["data_offsets"]
    return Parts(header, about, blob[:start], json.loads(zlib.decompress(blob[start:stop])))


def put_together(parts: Parts) -> bytes:
    """Return the file, its table deflated and its digest computed anew."""
    header, blob = dict(parts.header), bytes(parts.blob)
    if parts.table is not None:
        table = zlib.compress(json.dumps(parts.table).encode(), 1)
        if isinstance(header.get("clipquant.table"), dict):
            place = {"data_offsets": [len(blob), len(blob) + len(table)], "shape": [len(table)]}
            header["clipquant.table"] = {**header["clipquant.table"], **place}
        blob += table
    about = {**parts.about, "sha256": BLANK}
    said = json.dumps(about)[:-1] + parts.raw_tail + "}"
    head = json.dumps({"__metadata__": {"clipquant": said}, **header}).encode()
    head += b" " * (-len(head) % 8)
    head = struct.pack("<Q", len(head)) + head
    digest = hashlib.sha256(head + blob).hexdigest()
    return head.replace(BLANK.encode(), digest.encode(), 1) + blob


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every entry inside nested values."""
    inside = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in inside:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def mutated(parts: Parts, rng: random.Random) -> Parts:
    """Return a copy with one to four things changed."""
    made: Parts = pickle.loads(pickle.dumps(parts))  # several times as fast as a deep copy
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(_CHANGES)(made, rng)
    return made


def _somewhere(parts: Parts, rng: random.Random) -> tuple[Any, Any] | None:
    """Return a container inside of the parts and a key of it."""
    weights = ((parts.header, 2), (parts.about, 3), (parts.table, 5))
    roots = [root for root, weight in weights if root for _ in range(weight)]
    root = rng.choice(roots)
    paths = list(nodes(root))
    if not paths:
        return None
    *way, key = rng.choice(paths)
    for step in way:
        root = root[step]
    return root, key


def _replace(parts: Parts, rng: random.Random) -> None:
    if found := _somewhere(parts, rng):
        found[0][found[1]] = copy.deepcopy(rng.choice(NASTY))


def _nudge(parts: Parts, rng: random.Random) -> None:
    if (found := _somewhere(parts, rng)) and type(found[0][found[1]]) is int:
        found[0][found[1]] += rng.choice((-1, 1, 2, -8, 8, 1 << rng.randrange(62)))


def _remove(parts: Parts, rng: random.Random) -> None:
    if found := _somewhere(parts, rng):
        del found[0][found[1]]


def _swap(parts: Parts, rng: random.Random) -> None:
    one, other = _somewhere(parts, rng), _somewhere(parts, rng)
    if one and other:
        a, b = one[0][one[1]], copy.deepcopy(other[0][other[1]])
        other[0][other[1]] = copy.deepcopy(a)
        with contextlib.suppress(IndexError, KeyError):
            one[0][one[1]] = b


def _rename(parts: Parts, rng: random.Random) -> None:
    if (found := _somewhere(parts, rng)) and isinstance(found[0], dict):
        names = (
            "",
            "weight.q",
            "0.weight",
            "__proto__",
            "\x1b[2J",
            "\ud800",
            "clipquant.table",
            "a" * 5000,
        )
        found[0][rng.choice(names)] = found[0].pop(found[1])


def _grow(parts: Parts, rng: random.Random) -> None:
    if (found := _somewhere(parts, rng)) and isinstance(found[0], list):
        found[0].extend(copy.deepcopy(found[0][:500]) * rng.choice((1, 2, 49)))


def _deepen(parts: Parts, rng: random.Random) -> None:
    depth = rng.choice((10, 65, 1000, 20_000))
    parts.raw_tail = ',"deep":' + rng.choice(("[", '{"a":')) * depth
    parts.raw_tail += "0" + "]" * depth if parts.raw_tail.endswith("[") else "0" + "}" * depth


def _spoil(parts: Parts, rng: random.Random) -> None:
    for _ in range(rng.choice((1, 4, 30))):
        if parts.blob:
            parts.blob[rng.randrange(len(parts.blob))] = rng.choice((0, 255, rng.randrange(256)))


def _fill(parts: Parts, rng: random.Random) -> None:
    """Set a run of bytes: NaN and infinite scales, zero bits, codes beyond the grid."""
    run = (
        rng.choice(
            (b"\x00", b"\xff", b"\x00\x7c", b"\x00\x00\x80\x7f", b"\x00\x00\xc0\x7f", b"\x08")
        )
        * 9
    )
    if parts.blob:
        start = rng.randrange(len(parts.blob))
        parts.blob[start : start + len(run)] = run[: len(parts.blob) - start]


def _resize(parts: Parts, rng: random.Random) -> None:
    change = rng.choice((-8, -1, 1, 8, 300))
    if change < 0:
        del parts.blob[change:]
    else:
        parts.blob += bytes(change)


_CHANGES = (
    _replace, _replace, _replace, _nudge, _nudge, _remove, _swap, _rename, _grow, _deepen, _spoil, _fill, _resize,
)  # fmt: skip


def seeds() -> list[Seed]:
    """Return real files of both versions, with every kind of part that a file has."""
    torch.manual_seed(0)

    def pair() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2))

    def many() -> nn.Module:
        return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(12)))

    def transposed() -> nn.Module:
        return nn.ConvTranspose2d(4, 2, 3, groups=2).half()

    def sparse() -> nn.Module:
        torch.manual_seed(0)
        layer = nn.Linear(24, 16)
        layer.weight.data *= torch.rand_like(layer.weight) < 0.1
        return layer

    data = [torch.randn(64, 6)]
    made: list[tuple[QuantizedWeights, dict[str, Any], Callable[[], nn.Module]]]
    made = [
        (quantize(nn.Linear(8, 4), 4).weights, {}, lambda: nn.Linear(8, 4)),
        (quantize_weights(transposed(), Recipe(8, granularity=4)), {}, transposed),
        (
            quantize_weights(nn.Linear(3, 2), Recipe(8, levels=8, granularity="tensor")),
            {},
            lambda: nn.Linear(3, 2),
        ),
        (quantize_weights(many(), Recipe(3)), {}, many),
    ]
    for bits, granularity in ((2, None), (3, 8)):  # streams of codes
        weights = quantize_weights(sparse(), Recipe(bits, granularity=granularity, method="rtn"))
        made.append((with_coding(weights, "entropy"), {}, sparse))
    found = [Seed(take_apart(_bytes(weights, extra)), model) for weights, extra, model in made]
    auto = quantize(pair(), "auto", max_size=4000, data=data, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        found.append(Seed(take_apart(auto.save(Path(folder, "a")).read_bytes()), pair))
    old = Path(__file__).parents[1] / "tests" / "artifact" / "data" / "v1"
    for path in sorted(old.glob("*.safetensors")):
        if ".state" not in path.name:
            model = pair if "rows" in path.name else (lambda: nn.Linear(4, 3))
            found.append(Seed(take_apart(path.read_bytes()), model))
    return found


def _bytes(weights: Any, extra: Any) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        return save_artifact(weights, Path(folder, "a"), extra).read_bytes()


def _report(path: Path) -> str:
    held = read_outline(path)
    return render_page(report_of(held.weights, held.metadata, path.stat().st_size, str(path)))


def _shown(*args: str) -> int:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return command(list(args))


def calls(
    path: Path, model: Callable[[], nn.Module], number: int
) -> list[tuple[str, Callable[[], object]]]:
    """Return what is called on an input: loading always, else in turn, the command line now and then."""
    own: list[tuple[str, Callable[[], object]]] = [("load_quantized", lambda: load_quantized(path))]
    turns: list[tuple[str, Callable[[], object]]] = [
        ("load into a model", lambda: load_quantized(path, model())),
        ("load packed", lambda: load_quantized(path, model(), packed=True)),
        ("verify_artifact", lambda: verify_artifact(path)),
        ("read_metadata", lambda: read_metadata(path)),
        ("read_artifact", lambda: read_artifact(path)),
        ("report", lambda: _report(path)),
    ]
    own.append(turns[number % len(turns)])
    if number % 101 == 0:
        name = ("inspect", "verify", "report", "compare")[number // 101 % 4]
        files = (str(path),) * (2 if name == "compare" else 1)
        own.append((f"clipquant {name}", lambda: _shown(name, *files)))
    return own


def fuzz(inputs: int, seed: int, folder: Path, seconds: float = 1e9) -> Outcome:
    """Return what came of so many made-up files."""
    rng, outcome, corpus = random.Random(seed), Outcome(), seeds()
    first, path, end = len(corpus), folder / "made-up.safetensors", time.monotonic() + seconds
    for number in range(inputs):
        start = rng.choice(corpus)
        parts = mutated(start.parts, rng)
        try:
            data = put_together(parts)
        except (UnicodeEncodeError, TypeError, ValueError):
            continue
        path.write_bytes(data)
        outcome.inputs += 1
        if _try_all(path, start.model, number, outcome) and len(data) < 8_000:
            if len(corpus) < first + 200:
                corpus.append(Seed(parts, start.model))
            else:
                corpus[first + rng.randrange(200)] = Seed(parts, start.model)
        if time.monotonic() > end:
            break
    return outcome


def fuzz_in_turn(inputs: int, seed: int, folder: Path, seconds: float, jobs: int) -> Outcome:
    """Return what came of so many made-up files, tried by several processes."""
    total = Outcome()
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        share = [(inputs // jobs, seed + job, folder / str(job), seconds) for job in range(jobs)]
        for outcome in pool.starmap(_measured, share):
            total.join_(outcome)
    return total


def _measured(inputs: int, seed: int, folder: Path, seconds: float) -> Outcome:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    folder.mkdir()
    fuzz(300, seed + 1000, folder)  # takes the memory that any use of the package does
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome = fuzz(inputs, seed, folder, seconds)
    outcome.more_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return outcome


def _try_all(path: Path, model: Callable[[], nn.Module], number: int, outcome: Outcome) -> bool:
    """Call everything on a file; return whether it loaded."""
    loads = False
    for name, call in calls(path, model, number):
        began = time.perf_counter()
        try:
            call()
            outcome.loaded += 1
            loads = loads or name == "load_quantized"
        except ArtifactError as error:
            outcome.refused += 1
            if name == "load_quantized":
                outcome.rules[str(error).split(": ", 1)[-1].split(";")[0][:60]] += 1
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            outcome.other[f"{name}: {type(error).__name__}: {error}"[:150]] += 1
            kept = Path(tempfile.gettempdir(), f"clipquant-fuzz-{number}.safetensors")
            kept.write_bytes(path.read_bytes())
        took = time.perf_counter() - began
        outcome.calls += 1
        outcome.slowest = max(outcome.slowest, took)
    return loads


def flips(folder: Path) -> tuple[int, int]:
    """Flip every bit of small files; return how many were flipped and how many went unseen."""
    count = unseen = 0
    for number, seed in enumerate(seeds()):
        data = put_together(seed.parts)
        path = folder / f"flipped-{number}"
        for place in range(8 * len(data)):
            changed = bytearray(data)
            changed[place // 8] ^= 1 << place % 8
            path.write_bytes(changed)
            count += 1
            unseen += not verify_artifact(path)
    return count, unseen


def truncations(folder: Path) -> tuple[int, int]:
    """Cut small files at every length; return how many were cut and how many went unseen."""
    count = unseen = 0
    for number, seed in enumerate(seeds()):
        data = put_together(seed.parts)
        path = folder / f"cut-{number}"
        for length in range(len(data)):
            path.write_bytes(data[:length])
            count += 1
            unseen += not verify_artifact(path)
    return count, unseen


def kills(count: int, seed: int, folder: Path) -> tuple[int, int, int]:
    """Kill processes that save, at seeded moments; return kills, files lost and leavings that stay."""
    rng, lost = random.Random(seed), 0
    path = folder / "killed" / "model.safetensors"
    models = [quantize(nn.Linear(300, 300), bits, method="rtn") for bits in (2, 8)]
    for _ in range(count):
        worker = os.fork()
        if not worker:
            while True:
                for made in models:
                    made.save(path)
        time.sleep(rng.random() * 0.05)
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)
        lost += path.exists() and bool(verify_artifact(path))
    models[0].save(path)
    return count, lost, len(os.listdir(path.parent)) - 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--kills", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop the made-up files then")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(
        dir="/dev/shm" if Path("/dev/shm").is_dir() else None
    ) as place:
        folder = Path(place)
        killed, lost, left = kills(args.kills, args.seed, folder)
        flipped, unseen = flips(folder)
        cut, uncut = truncations(folder)
        outcome = fuzz_in_turn(args.inputs, args.seed, folder, args.seconds, args.jobs)
    other = sum(outcome.other.values())
    for said, times in outcome.rules.most_common(12):
        print(f"{times:9,}  {said}")
    for said, times in outcome.other.most_common(40):
        print(f"OTHER {times:,}  {said}")
    print("\n| fault | how many | what came of it |\n|---|---:|---|")
    print(
        f"| a process killed while it saves | {killed:,} | {lost} files lost, {left} leavings after the next save |"
    )
    print(f"| a bit flipped | {flipped:,} | {unseen} unseen |")
    print(f"| a file cut short | {cut:,} | {uncut} unseen |")
    print(
        f"| a made-up file with right digests | {outcome.inputs:,} | {outcome.calls:,} calls: "
        f"{outcome.loaded:,} returned, {outcome.refused:,} raised `ArtifactError`, {other:,} anything else |"
    )
    print(
        f"| the most that one of these took | | {outcome.slowest:.2f} s; "
        f"{outcome.more_mb:.0f} MB more memory than before |"
    )
    return int(bool(other or lost or left or unseen or uncut))


if __name__ == "__main__":
    raise SystemExit(main())
