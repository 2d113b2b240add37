"""Several processes end a fit together: see ../quantize_checks.py for what each checks."""

import ast
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "quantize_checks.py"
CHECKS = [
    node.name
    for node in ast.parse(SCRIPT.read_text()).body
    if isinstance(node, ast.FunctionDef) and node.name.startswith("check_")
]


@pytest.mark.parametrize("check", CHECKS)
def test_two_processes_agree(check, in_two_processes):
    assert in_two_processes(SCRIPT, check) == ""
