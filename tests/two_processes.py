"""Runs every function `check_*` of some scripts in one of two processes, or as many as PROCESSES says, in a gloo group.

Usage: python two_processes.py RANK FOLDER SCRIPT... What each check came to is written to FOLDER/outRANK as JSON:
nothing, or the traceback. The fixture `in_two_processes` starts both processes.
"""

import importlib.util
import json
import os
import sys
import traceback
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

COUNT = int(os.environ.get("PROCESSES", "2"))


def tell_lightning():
    """Let a Trainer of as many devices take this process and the group that exists already."""
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), NODE_RANK="0", WORLD_SIZE=str(COUNT))
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")  # nothing connects


def load(script):
    """Import a script under its own name."""
    spec = importlib.util.spec_from_file_location(Path(script).stem, script)
    checks = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = checks
    spec.loader.exec_module(checks)
    return checks


def outcome(check):
    """Return nothing, or the traceback of a check that failed."""
    try:
        check()
    except Exception:
        return traceback.format_exc()
    return ""


def run(rank, folder, scripts):
    """Run the checks of all scripts in their order, which is the same in both processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=COUNT,
        timeout=timedelta(seconds=30),
    )
    results = {}
    for script in scripts:
        for name, check in vars(load(script)).items():
            if name.startswith("check_"):
                results[f"{script}:{name}"] = outcome(check)
                Path(folder, f"out{rank}").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    run(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
