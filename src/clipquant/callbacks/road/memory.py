"""How much memory this machine has left."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def available_bytes() -> int | None:
    """Return the bytes that can still be taken: what the machine has free, or less where a container is given less.

    Returns:
        None where the system does not say.
    """
    free = (line for line in _lines(_MEMINFO) if line.startswith("MemAvailable:"))
    found = [int(line.split()[1]) * 1024 for line in free]
    limit, used = (_number(path) for path in (_LIMIT, _USED))
    if limit is not None and used is not None:
        found.append(max(limit - used, 0))
    return min(found, default=None)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def _number(path: Path) -> int | None:
    """Return what a file holds; None where it holds "max" or nothing."""
    held = "".join(_lines(path))
    return int(held) if held.isdecimal() else None
