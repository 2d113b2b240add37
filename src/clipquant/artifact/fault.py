"""What is raised of a file that cannot be trusted or used."""

from __future__ import annotations

from clipquant.errors import ArgumentError
from clipquant.shown import shown


class ArtifactError(ArgumentError):
    """A file that cannot be trusted or used: says which file, what is wrong, and what to do.

    Its text may be printed anywhere: what a file has put into it is shown escaped.
    """

    def __init__(self, said: object) -> None:
        super().__init__(shown(said))
