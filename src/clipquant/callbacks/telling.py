"""Warnings as lines for the user: what is wrong, without the line of this package's code that says so."""

from __future__ import annotations

import warnings

from lightning.pytorch.utilities import rank_zero_only


def warn(message: str) -> None:
    """Warn of something in the first of several processes.

    The warning has no place in the source: it is the user's settings that matter, and the screen shows the words alone.

    >>> with warnings.catch_warnings(record=True) as told:
    ...     warnings.simplefilter("always")
    ...     warn("no data")
    >>> print(told[0].filename, told[0].message)
    <clipquant> no data
    """
    _warn(message)


@rank_zero_only
def _warn(message: str) -> None:
    warnings.warn_explicit(message, UserWarning, "<clipquant>", 1)
