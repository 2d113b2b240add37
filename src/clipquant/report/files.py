"""The report as files beside the artifact, and where it was made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clipquant.report.page import render_page
from clipquant.report.plots import counted
from clipquant.report.record import QuantizationReport

JSON_FILE, PAGE_FILE = "report.json", "report.html"
_PACKAGES = ("clipquant", "torch", "lightning", "torchmetrics", "safetensors")


def write_report(report: QuantizationReport, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`.

    Args:
        report: What to write.
        folder: An existing folder.

    Returns:
        The two paths.

    Raises:
        OSError: If they cannot be written.
    """
    folder = Path(folder)
    record, page = folder / JSON_FILE, folder / PAGE_FILE
    record.write_text(json.dumps(report.to_dict(), indent=1) + "\n", "utf-8")
    page.write_text(render_page(report), "utf-8")
    return record, page


def environment() -> dict[str, str]:
    """Return the versions and the kind of machine that a report was made with.

    >>> sorted(environment())[:2]
    ['machine', 'packages']
    """
    return {
        "packages": ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {counted(torch.get_num_threads(), 'thread')}",
    }


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
