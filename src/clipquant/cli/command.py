"""What a command on files is, and the error that a command tells its user."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from clipquant.errors import ClipquantError


class CommandError(ClipquantError):
    """What the user has to change on the command line; shown as it is, without a traceback."""


class UsageError(CommandError):
    """A command line or a configuration that cannot be read; the exit code is 2."""


@dataclass(frozen=True)
class Command:
    """One command on files: its help line, the arguments it takes and what it does with them.

    Args:
        help: one line for ``clipquant --help``.
        add_arguments: declares the arguments on the command's parser, once the command is asked for.
        run: does the work and returns the exit code.
        example: one line that can be typed as it stands, but for its names.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    example: str = ""


def add_file(parser: argparse.ArgumentParser) -> None:
    """Declare the one argument of a command on one quantized file."""
    parser.add_argument("file", metavar="FILE", help="a quantized .safetensors file")
