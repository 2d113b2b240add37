"""The program: its parser, its commands, and errors told without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from clipquant import __version__
from clipquant.cli.command import Command, CommandError
from clipquant.cli.files import COMPARE, INSPECT, REPORT, VERIFY
from clipquant.cli.formats import BENCH, EXPORT
from clipquant.cli.trainer import TRAINER_COMMANDS, run_trainer

COMMANDS: dict[str, Command] = {
    "bench": BENCH,
    "compare": COMPARE,
    "export": EXPORT,
    "inspect": INSPECT,
    "report": REPORT,
    "verify": VERIFY,
}


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
