"""Errors that a user can mend: each says the rule, what was received and the remedy."""

from __future__ import annotations


class ClipquantError(Exception):
    """What the user has to change; the command line shows it as one line, all else with a traceback.

    Whatever this package raises on purpose derives from it, and from the built-in error that Python's own
    functions raise in such a case, so that `except ValueError` holds too.

    >>> issubclass(ArgumentError, ClipquantError) and issubclass(ArgumentError, ValueError)
    True
    """


class ArgumentError(ClipquantError, ValueError):
    """An argument, a setting or a file that cannot be, alone or beside another."""


class ArgumentTypeError(ClipquantError, TypeError):
    """An argument of a kind that is not taken."""


class RunError(ClipquantError, RuntimeError):
    """Code or data of the user's that failed when they were run."""


class PlaceError(ClipquantError, OSError):
    """A place on disk that cannot be read or written.

    >>> print(PlaceError(13, "model.bin cannot be written"))
    model.bin cannot be written
    """

    def __str__(self) -> str:
        return self.strerror or super().__str__()


class MissingFileError(PlaceError, FileNotFoundError):
    """A file that is nowhere, with the places where it was looked for."""


class MissingPackageError(ClipquantError, ModuleNotFoundError):
    """A package that is not installed here, with the command that brings it."""


def how_to_install(extra: str) -> str:
    """Return the command that brings an extra, for an installed package and for a checkout.

    >>> how_to_install("onnx")
    "pip install 'clipquant[onnx]', or from a checkout: pip install -c constraints.txt -e '.[onnx]'."
    """
    return f"pip install 'clipquant[{extra}]', or from a checkout: pip install -c constraints.txt -e '.[{extra}]'."
