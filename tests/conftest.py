"""Settings that every test shares."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Lightning's log handler keeps the stderr of its first import, which must outlive a single test's.
import lightning.pytorch  # noqa: F401
import pytest
import torch
from filelock import FileLock
from hypothesis import settings

# A loaded machine must not fail an example for its time; CI must find the same examples twice.
settings.register_profile("clipquant", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("clipquant")


HERE = Path(__file__).parent
SCRIPTS = sorted(p for p in HERE.rglob("*_checks.py") if not p.name.startswith("test_"))
collect_ignore = list(map(str, SCRIPTS))  # they import what only two_processes.py can


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory, worker_id):
    """Run every script of checks in two processes, once; return a function that gives a check's traceback, if any."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")
    if worker_id == "master":
        results = run_in_two_processes(tmp_path_factory.mktemp("two"))
    else:
        folder = tmp_path_factory.getbasetemp().parent / "two"  # of all workers of this run
        with FileLock(f"{folder}.lock"):
            if folder.exists():
                results = [json.loads((folder / f"out{rank}").read_text()) for rank in (0, 1)]
            else:
                folder.mkdir()
                results = run_in_two_processes(folder)

    def outcome(script, check):
        return "".join(result.get(f"{script}:{check}", "did not run") for result in results)

    return outcome


def run_in_two_processes(folder):
    """Run every script of checks in two processes; return each one's {check: traceback}."""
    logs, started = [], []
    for rank in (0, 1):
        logs.append((folder / f"log{rank}").open("w+"))
        command = [sys.executable, HERE / "two_processes.py", str(rank), folder, *map(str, SCRIPTS)]
        started.append(subprocess.Popen(command, stdout=logs[-1], stderr=subprocess.STDOUT))
    for process in started:
        process.wait(timeout=240)
    results = []
    for rank, log in enumerate(logs):
        log.seek(0)
        out = folder / f"out{rank}"
        assert out.exists(), log.read()
        results.append(json.loads(out.read_text()))
    return results
