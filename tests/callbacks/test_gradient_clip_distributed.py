"""GradientClipCallback under DDP and FSDP2 in two processes: what gradient_clip_checks.py checks."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "gradient_clip_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.fixture(scope="module")
def outcome(in_two_processes: Callable[[Path], Callable[[str], str]]) -> Callable[[str], str]:
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    return in_two_processes(SCRIPT)


@pytest.mark.parametrize("check", CHECKS)
def test_a_trainer_over_two_processes_clips_as_one(
    check: str, outcome: Callable[[str], str]
) -> None:
    assert outcome(check) == ""
