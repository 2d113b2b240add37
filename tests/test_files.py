"""The one writer: whole or not at all, synced before its name stands for it."""

import errno
import os
import stat
import subprocess
import sys

import pytest

from clipquant.errors import PlaceError
from clipquant.files import write_whole


def test_the_folder_is_made_and_nothing_else_is_left(tmp_path):
    write_whole(tmp_path / "a" / "b" / "file", b"new")
    assert (tmp_path / "a" / "b" / "file").read_bytes() == b"new"
    assert os.listdir(tmp_path / "a" / "b") == ["file"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_what_goes_wrong_leaves_the_old_file_alone(step, tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_bytes_are_synced_before_the_name_is_theirs_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    sync, replace = os.fsync, os.replace

    def noted_sync(handle):
        done.append("folder" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")
        sync(handle)

    def noted_replace(source, target):
        done.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "replace", noted_replace)
    write_whole(tmp_path / "file", b"new")
    assert done[:2] == ["file", "rename"]
    assert done[2:] == (["folder"] if os.name == "posix" else [])


def test_a_process_that_dies_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    source = (
        "import os, sys\n"
        "from clipquant.files import write_whole\n"
        "os.replace = lambda *args: os._exit(9)\n"
        f"write_whole({str(path)!r}, b'new')\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", source], env=env, check=False).returncode == 9
    assert path.read_bytes() == b"old"


def test_a_place_that_cannot_be_is_told_with_its_remedy(tmp_path):
    with pytest.raises(PlaceError, match="is a folder; name the file to write in it"):
        write_whole(tmp_path, b"new")
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(
        PlaceError, match=r"cannot be written .* name a place that is writable"
    ) as error:
        write_whole(tmp_path / "file" / "inner", b"new")
    assert error.value.errno in (errno.ENOTDIR, errno.EEXIST)
    assert "tmp" not in str(error.value).replace(str(tmp_path), "")
    assert isinstance(error.value, OSError)
    assert not str(error.value).startswith("[Errno")
