"""Packages that only some formats take, and what to do where they are missing."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from clipquant.errors import MissingPackageError, how_to_install


def require(what: str, packages: Sequence[str], extra: str) -> None:
    """Raise unless every package can be imported.

    Args:
        what: What takes them.
        packages: Their import names.
        extra: The extra of this package that brings them.

    Raises:
        MissingPackageError: Naming what is missing and the extra.

    >>> require("export to toy", ["no_such_package"], "toy")
    Traceback (most recent call last):
    ...
    clipquant.errors.MissingPackageError: export to toy needs no_such_package, not installed here: pip install \
'clipquant[toy]', or from a checkout: pip install -c constraints.txt -e '.[toy]'.
    """
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise MissingPackageError(
            f"{what} needs {', '.join(missing)}, not installed here: {how_to_install(extra)}"
        )
