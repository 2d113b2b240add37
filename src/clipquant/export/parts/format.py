"""What a format is: a name, a file, and how that is written and run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

from clipquant.export.example import ExportError
from clipquant.export.parts.needs import require
from clipquant.export.parts.record import ExportRecord
from clipquant.export.parts.subject import Subject

# From a batch size to a call that runs the file on so many rows; to None where the file fixes another size.
Calls: TypeAlias = Callable[[int], Callable[[], Any] | None]


class Format(ABC):
    """A way to write quantized weights so that they run without this package.

    A format is a frozen dataclass with this base and, as its fields, whatever it can be told. One of your own is given
    as an object, `QuantizeOnFitEnd(export=[Mine()])`, by `class_path` in a YAML file once it is imported, or as
    `--format package.module:Mine` on the command line.

    Attributes:
        name: What users call it.
        suffix: How the names of its files end.
        needs: Import names of the packages that writing and running it take.
        extra: The extra of this package that brings them.
        traces: Whether it is written from the model and a call of it, not from the weights alone.
        calibrates: Whether it needs calls whose activations set ranges.
        opens: Whether its files can be run here.
    """

    name: ClassVar[str]
    suffix: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = ""
    traces: ClassVar[bool] = True
    calibrates: ClassVar[bool] = False
    opens: ClassVar[bool] = True

    @property
    def file(self) -> str:
        """The name of its file beside an artifact."""
        return f"model{self.suffix}"

    def require(self) -> None:
        """Raise unless the packages that it takes are installed.

        Raises:
            MissingPackageError: Naming what is missing and the extra that brings it.
        """
        require(f"export to {self.name}", self.needs, self.extra)

    @abstractmethod
    def write(self, subject: Subject, path: str | Path) -> ExportRecord:
        """Write a file and return what it came to.

        Args:
            subject: What is exported.
            path: Name of the file.

        Raises:
            ExportError: If the model has no such form; says why, and what to do.
            OSError: If the file cannot be written.
        """

    def open(self, path: str | Path, threads: int | None = None) -> Calls:
        """Return what runs a file on zeros of a batch size.

        Args:
            path: Name of the file.
            threads: Threads of one operator; None: the runtime's choice.
        """
        raise ExportError(f"{path}: files of the format {self.name!r} are not run here.")
