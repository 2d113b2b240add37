"""Distributed gradients in two processes: what distributed_checks.py checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "distributed_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_clip_as_one(
    check: str, in_two_processes: Callable[[Path, str], str]
) -> None:
    assert in_two_processes(SCRIPT, check) == ""
