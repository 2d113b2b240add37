"""Commands on other formats: a quantized file written as one, and their files timed side by side."""

from __future__ import annotations

import argparse
import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipquant.cli.command import Command, CommandError, add_file
from clipquant.errors import ArgumentError

if TYPE_CHECKING:
    from clipquant.export import Format, Subject
    from clipquant.export.example import Example
    from clipquant.quant.codes.weights import QuantizedWeights


def export_artifact(args: argparse.Namespace) -> int:
    """Write an artifact in another format, with the model's code but without its training."""
    from clipquant.artifact import read_artifact

    chosen: Format = args.format
    chosen.require()
    subject = _subject(chosen, args, read_artifact(args.file).weights)
    out = Path(args.output or Path(args.file).with_suffix(chosen.suffix))
    record = chosen.write(subject, out)
    within = "" if record.difference is None else f", outputs within {record.difference:.3g}"
    print(f"{record.path}: {record.bytes:,} bytes{within}")
    for line in (*record.notes, *(f"{k}: {v:.3g}" for k, v in record.latency.items())):
        print(f"  {line}")
    return 0


def _subject(chosen: Format, args: argparse.Namespace, weights: QuantizedWeights) -> Subject:
    """Return what the format is given: the weights, and a model and calls of it where it takes them."""
    from clipquant.artifact import load_state
    from clipquant.export import Subject, as_example

    if not chosen.traces:
        return Subject(weights)
    if args.model is None:
        raise CommandError(
            f"{chosen.name} is traced from the model: pass its class as --model package.module:Class."
        )
    model = _built(args.model, args.model_args)
    load_state(model, weights.state_dict(), str(args.file))  # says what does not fit
    inputs = _read_inputs(args.inputs) if args.inputs else None
    if inputs is None:
        example = _found_example(model)
    else:
        example = as_example(inputs)
        _check_inputs(model, example, args.inputs)
    if not chosen.calibrates:
        return Subject(weights, model, example)
    if inputs is None:
        raise CommandError(
            f"{chosen.name} calibrates the ranges of activations on data: pass --inputs FILE.npy or "
            ".npz with real inputs, a few hundred rows."
        )
    batches = [example.rows(i, i + 32) for i in range(0, example.batch_size or 1, 32)]
    return Subject(weights, model, batches[0], calibration=batches)


def _built(name: str, arguments: str) -> Any:
    """Return the model that `--model` and `--model-args` describe."""
    made = _named(name, "--model")
    try:
        return made(**json.loads(arguments))
    except (TypeError, ValueError) as error:
        raise CommandError(
            f"{name} cannot be built with --model-args {arguments!r}: {error}. Pass its arguments as a JSON object."
        ) from error


def _found_example(model: Any) -> Example:
    from clipquant.export import find_example
    from clipquant.export.example import ExportError

    try:
        return find_example(model)
    except ExportError as error:
        raise CommandError(
            f"{error} Or pass --inputs FILE.npy or .npz with real inputs."
        ) from error


def _check_inputs(model: Any, example: Example, path: str) -> None:
    """Raise unless the model runs on the first rows of what `--inputs` holds."""
    try:
        example.rows(0, 2).run(model.eval())
    except Exception as error:  # whatever a forward may raise
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in example.tensors)
        said = str(error).splitlines() or [type(error).__name__]
        raise CommandError(
            f"--inputs {path!r} does not fit {type(model).__name__}.forward: it holds {shapes}; {said[0]}. Save the "
            "arrays as forward takes them, the batch first; an .npz names them by forward's arguments."
        ) from error


def _named(name: str, option: str) -> Any:
    """Return what `package.module:Name` stands for."""
    place, _, attribute = name.partition(":")
    sys.path.insert(0, "")  # a script's own folder holds the user's modules
    try:
        return getattr(import_module(place), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CommandError(f"{option} {name!r} is not package.module:Class: {error}.") from error
    finally:
        sys.path.remove("")


def _format(given: str) -> Format:
    """Return a format by its name, or one of the user's own by `package.module:Class`."""
    from clipquant.export import Format, as_format

    if ":" not in given:
        try:
            return as_format(given)
        except ArgumentError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    own = _named(given, "--format")
    made = own() if isinstance(own, type) and issubclass(own, Format) else own
    if not isinstance(made, Format):
        raise CommandError(
            f"--format {given!r} is no Format: derive it from clipquant.export.Format."
        )
    return made


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
    from clipquant.report.naming import distinct
    from clipquant.report.plots import counted
    from clipquant.report.table import print_table

    rows = []
    timed = bench_files(args.files, args.batch, args.threads)
    names = distinct([file.path for file in timed], "/\\")
    for name, file in zip(names, timed, strict=True):
        memory = "?" if file.resident is None else f"{file.resident / 1e6:.1f}"
        times = (f"{file.latency[b]:.3f}" if b in file.latency else "fixed" for b in args.batch)
        rows.append((name, f"{file.bytes:,}", memory, *times))
    header = ("file", "bytes", "memory MB", *(f"ms, batch {b}" for b in args.batch))
    print_table(f"Medians of runs in turn, {counted(args.threads, 'thread')}", header, rows)
    return 0


def _add_export(parser: argparse.ArgumentParser) -> None:
    add_file(parser)
    from clipquant.export.formats import FORMATS

    parser.add_argument(
        "--model", metavar="MODULE:CLASS", help="its class; traced formats run its forward"
    )
    parser.add_argument(
        "--model-args", metavar="JSON", default="{}",
        help='the arguments of that class, as a JSON object: \'{"width": 64}\'',
    )  # fmt: skip
    names = ", ".join(FORMATS)
    parser.add_argument(
        "--format", required=True, type=_format, metavar="FORMAT",
        help=f"{names}, or one of your own as package.module:Class",
    )  # fmt: skip
    parser.add_argument(
        "--inputs", metavar="FILE",
        help=".npy or .npz of real inputs, the batch first; default: the module's example_input_array",
    )  # fmt: skip
    parser.add_argument(
        "--output", metavar="OUT", help="the file to write; default: beside the artifact"
    )


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "files",
        nargs="+",
        metavar="FILE",
        help="files of a format that runs here, as .onnx and .pt2",
    )
    parser.add_argument(
        "--batch", type=int, nargs="+", default=[1, 32], metavar="N", help="batch sizes"
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="threads of one operator"
    )


EXPORT = Command(
    "write a quantized file as ONNX or as a torch.export program",
    _add_export,
    export_artifact,
    "model.safetensors --format onnx --model net:Net --inputs images.npy",
)
BENCH = Command(
    "time exported files side by side on this machine: latency, memory and size",
    _add_bench,
    bench,
    "model.onnx model.int8.onnx --batch 1 64",
)
