"""GradientClipCallback under DDP and FSDP2 in two processes: what gradient_clip_checks.py checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "gradient_clip_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_a_trainer_over_two_processes_clips_as_one(
    check: str, in_two_processes: Callable[[Path, str], str]
) -> None:
    assert in_two_processes(SCRIPT, check) == ""
