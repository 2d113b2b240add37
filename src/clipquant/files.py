"""Files that stand on disk whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from clipquant.errors import PlaceError

try:
    import fcntl
except ImportError:  # Windows, which lets nobody remove a file that is open
    fcntl = None  # type: ignore[assignment]

PROBE = ".clipquant-probe"
# What runs write under until it is whole, and what they try a folder with.
_LEFT = re.compile(rf"\..+\.[0-9a-f]{{8}}\.tmp|{re.escape(PROBE)}[0-9a-f]*")


def write_whole(path: str | Path, data: bytes) -> None:
    """Write a file so that its name stands for the old bytes or the new, never for a part.

    The bytes are written beside the place, synced and read back, then renamed, and the folder is synced, so
    that the new file outlives a power cut. What goes wrong leaves the old file and nothing else; what a
    killed process has left beside it is removed by the next that writes the same file.

    Args:
        path: Name of the file; its folder is made where it is missing.
        data: All of its bytes.

    Raises:
        OSError: If the folder cannot be made, is not writable or full, or gives back other bytes.

    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     write_whole(f"{folder}/new/a.bin", b"whole")
    ...     print(Path(folder, "new", "a.bin").read_bytes(), os.listdir(f"{folder}/new"))
    b'whole' ['a.bin']
    """
    path = Path(path)
    if not path.name or path.is_dir():
        raise PlaceError(errno.EISDIR, f"{path} is a folder; name the file to write in it")
    try:
        _write_whole(path, data)
    except PlaceError:
        raise
    except OSError as error:
        raise PlaceError(
            error.errno,
            f"{path} cannot be written ({error.strerror or error}); name a place that is writable and has room",
        ) from error


def _write_whole(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sweep(path.parent, path.name)
    with _temporary(path) as (file, place):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != data:
            raise PlaceError(
                f"{path}: read back, the bytes differ from what was written; try again."
            )
        if fcntl is None:
            file.close()
        os.replace(place, path)
    _sync_folder(path.parent)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove the temporary files of killed processes from a folder; those of live ones are locked, and stay.

    Args:
        folder: Where to look.
        name: Of the file whose temporary files are meant; None: of every file.
    """
    with suppress(OSError):
        for entry in list(os.scandir(folder)):
            own = name is None or entry.name.startswith(f".{name}.")
            if own and _LEFT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    _remove_unless_locked(Path(entry.path))


def _remove_unless_locked(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()


@contextmanager
def _temporary(path: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Yield a new file beside `path`, locked while it is open, and its name; remove it if anything fails."""
    while True:
        place = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        with open(place, "x+b") as file:
            try:
                if not _locked(file, place):
                    continue
                yield file, place
            except BaseException:
                with suppress(OSError):
                    place.unlink()
                raise
        return


def _locked(file: BinaryIO, place: Path) -> bool:
    """Lock a new file; return whether it still has its name, which a sweep may just have taken."""
    if fcntl is None:
        return True
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_EX)
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(place))
    except FileNotFoundError:
        return False


def _sync_folder(folder: Path) -> None:
    """Make the rename last through a power cut, where the system can open folders (not Windows)."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
