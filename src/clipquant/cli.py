"""The command line: Lightning's own commands with this package's names, and commands on quantized files."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from clipquant import __version__

if TYPE_CHECKING:
    from clipquant.artifact import Artifact

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

    # Lightning's parser calls names that jsonargparse has renamed; users cannot act on that.
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
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
    print_table(str(path), ("name", "shape", "bits", "bytes"), list(_tensor_rows(artifact)))
    print(
        f"{Path(path).stat().st_size:,} bytes in all, format_version "
        f"{artifact.metadata['format_version']}, {_name_versions(artifact)}"
    )
    return 0


def _tensor_rows(artifact: Artifact) -> Iterator[tuple[str, str, str, str]]:
    from clipquant.report.record import stored_bytes

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
    "inspect": Command(
        "show what a quantized file holds: name, shape, bits and bytes of every tensor",
        _add_file,
        lambda args: inspect_file(args.file),
    ),
    "verify": Command(
        "say whether a quantized file is whole, or what is damaged; exit code 1 if so",
        _add_file,
        lambda args: verify_file(args.file),
    ),
}
