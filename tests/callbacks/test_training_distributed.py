"""QuantizationAwareTraining and SparsifyWeights under DDP in two processes: what training_checks.py checks."""

import re
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent / "training_checks.py"
CHECKS = re.findall(r"^def (check_\w+)", SCRIPT.read_text(), re.MULTILINE)


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_train_as_one(check, in_two_processes):
    assert in_two_processes(SCRIPT, check) == ""
