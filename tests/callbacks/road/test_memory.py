"""Free memory: what the machine has, or less where a container has less, and nothing where nobody says."""

from __future__ import annotations

from pathlib import Path

import pytest

from clipquant.callbacks.road import memory


def test_the_lesser_of_machine_and_container_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_MEMINFO", "_LIMIT", "_USED"):
        monkeypatch.setattr(memory, name, tmp_path / name)
    assert memory.available_bytes() is None
    (tmp_path / "_MEMINFO").write_text("MemTotal: 9 kB\nMemAvailable:    4 kB\n")
    assert memory.available_bytes() == 4096
    (tmp_path / "_USED").write_text("1000\n")
    (tmp_path / "_LIMIT").write_text("max\n")
    assert memory.available_bytes() == 4096
    (tmp_path / "_LIMIT").write_text("1500")
    assert memory.available_bytes() == 500
    (tmp_path / "_USED").write_text("2000")
    assert memory.available_bytes() == 0
