"""Settings that every test shares."""

import json
import os
import subprocess
import sys
from pathlib import Path

# Lightning's log handler keeps the stderr of its first import, which must outlive a single test's.
import lightning.pytorch  # noqa: F401
import pytest
from hypothesis import settings

# A loaded machine must not fail an example for its time; CI must find the same examples twice.
settings.register_profile("clipquant", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("clipquant")


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory):
    """Run a script of checks in two processes; return a function that gives each check's traceback, if any."""

    def run(script):
        folder = tmp_path_factory.mktemp("two")
        runner = Path(__file__).parent / "two_processes.py"
        commands = [
            [sys.executable, runner, script, str(rank), folder / "store", folder / f"out{rank}"]
            for rank in (0, 1)
        ]
        logs = [(folder / f"log{rank}").open("w+") for rank in (0, 1)]
        started = [
            subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            for command, log in zip(commands, logs, strict=True)
        ]
        for process in started:
            process.wait(timeout=240)
        results = []
        for rank, log in enumerate(logs):
            log.seek(0)
            out = folder / f"out{rank}"
            assert out.exists(), log.read()
            results.append(json.loads(out.read_text()))
        return lambda check: "".join(result.get(check, "did not run") for result in results)

    return run
