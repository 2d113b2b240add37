"""The command line: Lightning's own commands with this package's names, and commands on files."""

from clipquant.cli.command import Command
from clipquant.cli.program import COMMANDS, build_parser, main

__all__ = ["COMMANDS", "Command", "build_parser", "main"]
