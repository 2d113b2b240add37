"""Collects the Python snippets of README.md as tests, and gives docstrings' examples the name torch."""

import os
import tempfile
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores: more threads than cores wait for each other. Set before torch is loaded.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser


@pytest.fixture(autouse=True)
def _name_torch(doctest_namespace: dict[str, Any]) -> None:
    doctest_namespace["torch"] = torch


def enter_folder(namespace: dict[str, Any]) -> None:
    """Run the snippets where what they write is thrown away."""
    namespace["_folder"] = tempfile.TemporaryDirectory()
    namespace["_before"] = Path.cwd()
    os.chdir(namespace["_folder"].name)


def leave_folder(namespace: dict[str, Any]) -> None:
    """Go back and remove the folder."""
    os.chdir(namespace["_before"])
    namespace["_folder"].cleanup()


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    pattern="README.md",
    setup=enter_folder,
    teardown=leave_folder,
).pytest()
