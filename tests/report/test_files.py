"""The report as files, and where it was made."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from torch import nn

import clipquant
from clipquant import quantize
from clipquant.report import environment, write_report


def test_both_files_say_the_same(tmp_path: Path) -> None:
    report = quantize(nn.Linear(4, 4), 8).report
    record, page = write_report(report, tmp_path)
    assert (record.name, page.name) == ("report.json", "report.html")
    assert json.loads(record.read_text("utf-8"))["verdict"] == report.verdict
    assert report.verdict in page.read_text("utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.html", "report.json"]


def test_a_place_that_cannot_be_written_is_an_oserror(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    with pytest.raises(OSError, match=r"report\.json"):
        write_report(quantize(nn.Linear(4, 4), 8).report, tmp_path)


def test_a_disk_that_fills_up_leaves_the_older_reports_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = quantize(nn.Linear(4, 4), 8).report
    write_report(old, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"report\.json and .*report\.html could not be written"):
        write_report(quantize(nn.Linear(6, 4), 2).report, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_page_is_written_where_the_record_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "report.json").mkdir()
    report = quantize(nn.Linear(4, 4), 8).report
    with pytest.raises(OSError, match=r"report\.json"):
        write_report(report, tmp_path)
    assert "</html>" in (tmp_path / "report.html").read_text("utf-8")


def test_the_environment_names_versions_and_an_unknown_one() -> None:
    known = environment()
    assert (
        f"clipquant {clipquant.__version__}" in known["packages"]
        or "clipquant unknown" in known["packages"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipquant.report.files._PACKAGES", ("no-such-package",))
        assert environment()["packages"] == "no-such-package unknown"
