"""The report as files, and where it was made."""

from __future__ import annotations

import json
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


def test_the_environment_names_versions_and_an_unknown_one() -> None:
    known = environment()
    assert (
        f"clipquant {clipquant.__version__}" in known["packages"]
        or "clipquant unknown" in known["packages"]
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("clipquant.report.files._PACKAGES", ("no-such-package",))
        assert environment()["packages"] == "no-such-package unknown"
