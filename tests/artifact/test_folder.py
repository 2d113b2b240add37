"""Folders that several runs share: probes, temporary files of killed runs and of live ones."""

import multiprocessing
import os
import subprocess
import sys

import pytest

from clipquant.artifact import claim_folder
from clipquant.files import sweep, write_whole

SAVER = """
import os, sys
from clipquant.files import write_whole
sync = os.fsync
def slow(handle):
    print("writing", flush=True)
    sys.stdin.readline()
    sync(handle)
os.fsync = slow
write_whole(sys.argv[1], b"slow")
os.fsync = sync
print("written", flush=True)
"""


def started(path):
    worker = subprocess.Popen(
        [sys.executable, "-c", SAVER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout.readline() == "writing\n"
    return worker


def temporaries(folder):
    return sorted(name for name in os.listdir(folder) if name.endswith(".tmp"))


@pytest.mark.parametrize(
    "again", [claim_folder, lambda f: write_whole(f / "model.safetensors", b"")]
)
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path, again):
    worker = started(tmp_path / "model.safetensors")
    worker.kill()
    worker.communicate()
    (tmp_path / ".clipquant-probe0123abcd").touch()
    (tmp_path / ".clipquant-probe").touch()
    assert len(temporaries(tmp_path)) == 1
    again(tmp_path)
    assert temporaries(tmp_path) == []
    if again is claim_folder:
        assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.name != "posix", reason="locks of another kind")
def test_what_a_live_run_writes_is_left_alone(tmp_path):
    path = tmp_path / "model.safetensors"
    worker = started(path)
    held = temporaries(tmp_path)
    claim_folder(tmp_path)
    write_whole(path, b"quick")
    assert temporaries(tmp_path) == held
    out, _ = worker.communicate("\n\n")
    assert out.endswith("written\n")
    assert path.read_bytes() == b"slow"
    assert os.listdir(tmp_path) == [path.name]


def test_files_of_others_are_left_alone(tmp_path):
    others = [".hidden", ".model.tmp", "model.0123abcd.tmp", ".a.0123ABCD.tmp", ".clipquant-probes"]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".b.0123abcd.tmp").mkdir()
    (tmp_path / ".c.0123abcd.tmp").symlink_to(tmp_path / ".hidden")
    sweep(tmp_path)
    assert set(os.listdir(tmp_path)) == {*others, ".b.0123abcd.tmp", ".c.0123abcd.tmp"}


def test_a_sweep_that_meets_a_newborn_file_costs_its_writer_nothing(tmp_path, monkeypatch):
    """Between a file's birth and its lock a sweep may take it: the writer notices, and makes another."""
    import fcntl

    lock, swept = fcntl.flock, []

    def swept_before(file, how):
        if not swept and how == fcntl.LOCK_EX:
            swept.append(file.name)
            os.unlink(file.name)
        return lock(file, how)

    monkeypatch.setattr(fcntl, "flock", swept_before)
    write_whole(tmp_path / "a", b"whole")
    assert (tmp_path / "a").read_bytes() == b"whole"
    assert os.listdir(tmp_path) == ["a"]
    assert len(swept) == 1


def claim_often(folder, number):
    for turn in range(40):
        claim_folder(folder)
        write_whole(folder / "model.safetensors", bytes([number]) * (1000 + turn))


def test_runs_that_start_at_once_do_not_disturb_one_another(tmp_path):
    context = multiprocessing.get_context("fork" if os.name == "posix" else "spawn")
    workers = [context.Process(target=claim_often, args=(tmp_path / "q", n)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0, 0, 0]
    assert os.listdir(tmp_path / "q") == ["model.safetensors"]
    assert len(set((tmp_path / "q" / "model.safetensors").read_bytes())) == 1


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(OSError, match="denied"):
        claim_folder(tmp_path)


def test_a_folder_in_place_of_which_a_file_stands_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="a"):
        claim_folder(tmp_path / "a")


def test_bytes_that_come_back_changed_never_get_the_name(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    sync = os.fsync

    def spoil(handle):
        os.pwrite(handle, b"X", 0)
        sync(handle)

    monkeypatch.setattr(os, "fsync", spoil)
    with pytest.raises(OSError, match="read back, the bytes differ"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]
