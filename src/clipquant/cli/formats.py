"""Commands on other formats: a quantized file written as one, and their files timed side by side."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

from clipquant.cli.command import Command, CommandError, add_file

_ENDINGS = {"pt2": ".pt2", "onnx": ".onnx", "onnx-int8": ".int8.onnx"}


def export_artifact(args: argparse.Namespace) -> int:
    """Write an artifact in another format, with the model's code but without its training."""
    from clipquant.artifact import read_artifact
    from clipquant.export import as_example, export_onnx, export_onnx_int8, export_pt2, find_example

    module = _build_model(args.model, json.loads(args.model_args))
    weights = read_artifact(args.file).weights
    out = Path(args.output or Path(args.file).with_suffix(_ENDINGS[args.format]))
    inputs = _read_inputs(args.inputs) if args.inputs else None
    example = find_example(module) if inputs is None else as_example(inputs)
    if args.format == "onnx-int8":
        if inputs is None:
            raise CommandError(
                "onnx-int8 calibrates the ranges of activations on data: pass --inputs FILE.npy or "
                ".npz with real inputs, a few hundred rows."
            )
        batches = [example.rows(i, i + 32) for i in range(0, example.batch_size or 1, 32)]
        record = export_onnx_int8(module, weights, batches[0], out, calibration=batches)
    else:
        write = export_pt2 if args.format == "pt2" else export_onnx
        record = write(module, weights, example, out)
    print(f"{record.path}: {record.bytes:,} bytes, outputs within {record.difference:.3g}")
    for line in (*record.notes, *(f"{k}: {v:.3g}" for k, v in record.latency.items())):
        print(f"  {line}")
    return 0


def _build_model(name: str, arguments: dict[str, object]) -> Any:
    """Return an instance of `package.module:Class`."""
    place, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # a script's own folder holds the user's modules
    try:
        found = getattr(import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"--model {name!r} is not package.module:Class: {error}.") from error
    finally:
        sys.path.remove("")
    return found(**arguments)


def _read_inputs(path: str) -> Any:
    """Return the array of an .npy file, or the arrays of an .npz file by their names, as tensors."""
    import numpy as np
    import torch

    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
        return torch.from_numpy(loaded)
    return {name: torch.from_numpy(loaded[name]) for name in loaded.files}


def bench(args: argparse.Namespace) -> int:
    """Print size, memory and latency of files side by side."""
    from clipquant.export.bench import bench_files
    from clipquant.report.table import print_table

    rows = []
    for file in bench_files(args.files, args.batch, args.threads):
        memory = "?" if file.resident is None else f"{file.resident / 1e6:.1f}"
        times = (f"{file.latency[b]:.3f}" if b in file.latency else "fixed" for b in args.batch)
        rows.append((file.path, f"{file.bytes:,}", memory, *times))
    header = ("file", "bytes", "memory MB", *(f"ms, batch {b}" for b in args.batch))
    print_table(f"Medians of interleaved runs, {args.threads} threads", header, rows)
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    parser.add_argument("--model", required=True, help="its class, as package.module:Class")
    parser.add_argument(
        "--model-args", default="{}", help="the class's arguments, as a JSON object"
    )
    parser.add_argument("--format", required=True, choices=sorted(_ENDINGS))
    parser.add_argument("--inputs", help=".npy or .npz of inputs; default: example_input_array")
    parser.add_argument("--output", help="the file to write; default: beside the artifact")


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("files", nargs="+", metavar="FILE", help=".onnx and .pt2 files")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="batch sizes")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operator")


EXPORT = Command(
    "write a quantized file as ONNX or as a torch.export program", _add_export, export_artifact
)
BENCH = Command(
    "time exported files side by side on this machine: latency, memory and size", _add_bench, bench
)
