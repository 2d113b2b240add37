"""The program: its parser, its commands, and errors told without a traceback."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from clipquant._version import __version__
from clipquant.cli.command import Command, CommandError, UsageError
from clipquant.cli.files import COMPARE, INSPECT, REPORT, VERIFY
from clipquant.cli.formats import BENCH, EXPORT
from clipquant.cli.trainer import TRAINER_COMMANDS, run_trainer
from clipquant.errors import ClipquantError
from clipquant.shown import shown_lines

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
    except Exception as error:
        told = _find_told(error)
        if show_traceback or told is None:
            raise
        print(f"clipquant: error: {shown_lines(told)}", file=sys.stderr)
        return 2 if isinstance(told, UsageError) else 1


def run_command(args: Sequence[str]) -> int:
    """Parse ``args`` and run the command on files that they name."""
    parser = build_parser()
    parsed = parser.parse_args(args)
    if parsed.command is None:
        parser.print_help()
        return 2
    try:
        return COMMANDS[parsed.command].run(parsed)
    except ClipquantError:
        raise
    except OSError as error:
        raise CommandError(error) from error


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands, those of the Trainer with their help line only."""
    parser = _Parser(
        prog="clipquant",
        description="Gradient clipping and weight quantization as PyTorch Lightning callbacks.",
        epilog="clipquant COMMAND --help shows the arguments of a command. "
        "clipquant --traceback COMMAND ... shows where an error was raised. "
        "Exit codes: 0 done, 1 an error, 2 a command line or a configuration that cannot be read.",
    )
    parser.add_argument("--version", action="version", version=f"clipquant {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, text in TRAINER_COMMANDS.items():
        commands.add_parser(name, help=text, add_help=False)
    for name, command in COMMANDS.items():
        said = f"{command.help[:1].upper()}{command.help[1:]}."
        example = f"For example: clipquant {name} {command.example}"
        own = commands.add_parser(name, help=command.help, description=said, epilog=example)
        own.declare = command.add_arguments
    return parser


class _Parser(argparse.ArgumentParser):
    """A parser whose arguments are declared when it first parses: what they may be can take long to load."""

    declare: Callable[[argparse.ArgumentParser], None] | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.declare is not None:
            declare, self.declare = self.declare, None
            declare(self)
        return super().parse_known_args(args, namespace)


def _find_told(error: BaseException | None) -> ClipquantError | None:
    """Return the error of a chain of causes that has words for the user; None: a fault of the program's."""
    while error is not None and not isinstance(error, ClipquantError):
        error = error.__cause__
    return error
