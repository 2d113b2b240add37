"""Runs every function `check_*` of a script in one of two processes that share a gloo group.

Usage: python two_processes.py SCRIPT RANK STORE OUT. What each check came to is written to OUT as JSON: nothing,
or the traceback. The fixture `in_two_processes` starts both processes.
"""

import importlib.util
import json
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist


def run(script, rank, store, out):
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("checks", script)
    checks = importlib.util.module_from_spec(spec)
    sys.modules["checks"] = checks
    spec.loader.exec_module(checks)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for name, check in vars(checks).items():
        if name.startswith("check_"):
            try:
                check()
                results[name] = ""
            except Exception:
                results[name] = traceback.format_exc()
        Path(out).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    run(sys.argv[1], int(sys.argv[2]), *sys.argv[3:])
