"""A folder that a run will write to: whether it can, and what killed runs have left in it."""

from __future__ import annotations

import secrets
from pathlib import Path

from clipquant.files import PROBE, sweep


def claim_folder(folder: str | Path) -> None:
    """Make a folder where it is missing, raise unless a file can be made in it, and clear it of leavings.

    Several runs may do so at once: each makes a file of its own, and none removes what a live one writes.

    Args:
        folder: Where files will be written.

    Raises:
        OSError: If it cannot be made, or no file in it can.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     claim_folder(f"{folder}/new")
    ...     print(list(Path(folder, "new").iterdir()))
    []
    """
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    probe = place / f"{PROBE}{secrets.token_hex(8)}"
    probe.touch(exist_ok=False)
    probe.unlink(missing_ok=True)  # another run may take it for a killed one's
    sweep(place)
