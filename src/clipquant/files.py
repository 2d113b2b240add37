"""Files that stand on disk whole or not at all."""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from pathlib import Path


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that its name stands for the old bytes or the new, never for a part.

    The bytes are written beside the place and synced, then renamed, and the folder is synced, so that the
    new file outlives a power cut. What goes wrong leaves the old file and nothing else.

    Args:
        path: Name of the file; its folder is made where it is missing.
        data: All of its bytes.

    Raises:
        OSError: If the folder cannot be made, is not writable or full.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/new/a.bin", b"whole")
    ...     print(Path(folder, "new", "a.bin").read_bytes(), os.listdir(f"{folder}/new"))
    b'whole' ['a.bin']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can open folders (not Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
