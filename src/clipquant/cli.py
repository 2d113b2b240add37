"""The command line: Lightning's own commands with this package's names, and commands on quantized files."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipquant import __version__

if TYPE_CHECKING:
    from clipquant.artifact import Artifact
    from clipquant.report.record import QuantizationReport

TRAINER_COMMANDS = {
    "fit": "train the model of a YAML file: clipquant fit --config FILE",
    "validate": "run one validation epoch",
    "test": "run one test epoch",
    "predict": "run the model over the prediction data",
}


class CommandError(Exception):
    """What the user has to change; shown as it is, without a traceback."""


@dataclass(frozen=True)
class Command:
    """One command on files: its help line, the arguments it takes and what it does with them.

    Args:
        help: one line for ``clipquant --help``.
        add_arguments: declares the arguments on the command's parser.
        run: does the work and returns the exit code.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 for success, 1 for an error, 2 for wrong usage.

    Args:
        argv: the arguments after the program's name; None: those of the process.

    Returns:
        The exit code.

    Example:
        >>> main(["verify", "no-such-file.safetensors"])
        1
    """
    args = list(sys.argv[1:] if argv is None else argv)
    show_traceback = args[:1] == ["--traceback"]
    args = args[show_traceback:]
    try:
        return run_trainer(args) if args and args[0] in TRAINER_COMMANDS else run_command(args)
    except (CommandError, ValueError, TypeError, OSError, ImportError) as error:
        told = _find_told(error)
        if show_traceback or told is None:
            raise
        print(f"clipquant: error: {told}", file=sys.stderr)
        return 1


def run_command(args: Sequence[str]) -> int:
    """Parse ``args`` and run the command on files that they name."""
    parser = build_parser()
    parsed = parser.parse_args(args)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        return COMMANDS[parsed.command].run(parsed)
    except OSError as error:
        raise CommandError(error) from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, those of the Trainer with their help line only."""
    parser = argparse.ArgumentParser(
        prog="clipquant",
        description="Gradient clipping and weight quantization as PyTorch Lightning callbacks.",
        epilog="clipquant COMMAND --help shows the arguments of a command. "
        "clipquant --traceback COMMAND ... shows where an error was raised.",
    )
    parser.add_argument("--version", action="version", version=f"clipquant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, command in COMMANDS.items():
        command.add_arguments(
            commands.add_parser(name, help=command.help, description=command.help)
        )
    return parser


def run_trainer(args: Sequence[str]) -> int:
    """Run one of Lightning's commands, with this package's classes known by their short names."""
    if find_spec("jsonargparse") is None or find_spec("docstring_parser") is None:
        raise CommandError(
            f"clipquant {args[0]} needs jsonargparse[signatures]: pip install 'clipquant[cli]'."
        )
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    # Lightning calls names that jsonargparse and torch have renamed; users cannot act on that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    warnings.filterwarnings("ignore", message=r".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="LightningCLI's args parameter is intended")
    from lightning.pytorch.cli import LightningCLI

    _import_names()
    try:
        # Without a logger the configuration would land in the working folder, and a second run stop at it.
        LightningCLI(args=list(args), save_config_kwargs={"overwrite": True})
    except MisconfigurationException as error:
        raise CommandError(error) from error
    return 0


def inspect_file(path: str | Path) -> int:
    """Print what a quantized file holds, a line a tensor, after proving it whole.

    Args:
        path: a file written by ``QuantizeOnFitEnd`` or ``QuantizedModel.save``.

    Returns:
        0.

    Raises:
        ArtifactError: where the file is missing, damaged, or no such file.
    """
    from clipquant.artifact import read_artifact
    from clipquant.report.table import print_table

    artifact = read_artifact(path)
    print_table(Path(path).name, ("name", "shape", "bits", "bytes"), list(_tensor_rows(artifact)))
    print(
        f"{Path(path).stat().st_size:,} bytes in all, format_version "
        f"{artifact.metadata['format_version']}, {_name_versions(artifact)}"
    )
    return 0


def report_file(path: str | Path, html: str | Path | None) -> int:
    """Print the report of a quantized file, or write it as HTML, from the file alone.

    Args:
        path: a file written by ``QuantizeOnFitEnd`` or ``QuantizedModel.save``.
        html: where to write the page; None: print tables.

    Returns:
        0.

    Raises:
        ArtifactError: where the file is missing, damaged, or no such file.
    """
    from clipquant.report.page import render_page
    from clipquant.report.table import print_report

    report = _read_report(path)
    if html is None:
        print_report(report)
        return 0
    Path(html).write_text(render_page(report), "utf-8")
    print(f"Report: {html}")
    return 0


def compare_files(one: str | Path, other: str | Path) -> int:
    """Print two quantized files side by side: size, metrics, and each weight's bits and SQNR."""
    from clipquant.report.table import compare_rows, print_table

    rows = compare_rows(_read_report(one), _read_report(other))
    print_table("Compared", ("", str(one), str(other)), rows)
    return 0


def _read_report(path: str | Path) -> QuantizationReport:
    from clipquant.artifact import read_artifact
    from clipquant.report.stored import report_of

    artifact = read_artifact(path)
    return report_of(artifact.weights, artifact.metadata, Path(path).stat().st_size, str(path))


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", help="a quantized file")
    parser.add_argument("--html", metavar="OUT", help="write the report as one HTML page instead")


def _add_two_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", help="a quantized file")
    parser.add_argument("other", help="another")


def _tensor_rows(artifact: Artifact) -> Iterator[tuple[str, str, str, str]]:
    from clipquant.report.layers import stored_bytes

    weights = artifact.weights
    for name, tensor in weights.tensors.items():
        bits = f"{tensor.code_bits / max(tensor.numel, 1):.3g}"
        yield name, _show_shape(tensor.layout.shape), bits, f"{stored_bytes(tensor):,}"
    for name, value in weights.floats.items():
        dtype = str(value.dtype).removeprefix("torch.")
        yield name, _show_shape(value.shape), dtype, f"{value.nbytes:,}"
    for alias, name in weights.aliases.items():
        yield alias, f"tied to {name}", "", "0"


def _show_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _name_versions(artifact: Artifact) -> str:
    versions: dict[str, str] = artifact.metadata["versions"]
    return "written by " + ", ".join(f"{name} {version}" for name, version in versions.items())


def verify_file(path: str | Path) -> int:
    """Print whether a quantized file is whole, or everything that is damaged in it.

    Args:
        path: the file.

    Returns:
        0 where it is whole, 1 otherwise.

    Raises:
        CommandError: where there is no such file.
    """
    from clipquant.artifact import verify_artifact

    if not Path(path).is_file():
        raise CommandError(f"{path} is no file: pass the path of a quantized .safetensors file.")
    damage = verify_artifact(path)
    if not damage:
        print(f"{path}: ok")
    elif damage[0].startswith(str(path)):
        print(damage[0])
    else:
        print(f"{path} is damaged: {', '.join(damage)}. Fetch or write it again.")
    return 1 if damage else 0


def export_artifact(args: argparse.Namespace) -> int:
    """Write an artifact in another format, with the model's code but without its training."""
    import json
    from pathlib import Path

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


_ENDINGS = {"pt2": ".pt2", "onnx": ".onnx", "onnx-int8": ".int8.onnx"}


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
    _add_file(parser)
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


def _add_file(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a quantized .safetensors file")


def _import_names() -> None:
    # jsonargparse resolves a short class_path among the subclasses that are imported.
    import clipquant.clip
    import clipquant.reference

    for name in clipquant.__all__:
        getattr(clipquant, name)


def _find_told(error: BaseException | None) -> BaseException | None:
    """Return the error of a chain of causes that this package raised, with words for the user."""
    while error is not None and not _is_told_here(error):
        error = error.__cause__
    return error


def _is_told_here(error: BaseException) -> bool:
    if isinstance(error, CommandError):
        return True
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    home = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return str(home).split(".")[0] == "clipquant"


COMMANDS: dict[str, Command] = {
    "bench": Command(
        "time exported files side by side on this machine: latency, memory and size",
        _add_bench,
        bench,
    ),
    "compare": Command(
        "lay two quantized files side by side: size, metrics, bits and SQNR of every weight",
        _add_two_files,
        lambda args: compare_files(args.one, args.other),
    ),
    "export": Command(
        "write a quantized file as ONNX or as a torch.export program",
        _add_export,
        export_artifact,
    ),
    "inspect": Command(
        "show what a quantized file holds: name, shape, bits and bytes of every tensor",
        _add_file,
        lambda args: inspect_file(args.file),
    ),
    "report": Command(
        "print the report of a quantized file, or write it as HTML, from the file alone",
        _add_report,
        lambda args: report_file(args.file, args.html),
    ),
    "verify": Command(
        "say whether a quantized file is whole, or what is damaged; exit code 1 if so",
        _add_file,
        lambda args: verify_file(args.file),
    ),
}
