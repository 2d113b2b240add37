"""The report as files beside the artifact, and where it was made."""

from __future__ import annotations

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from clipquant.errors import PlaceError
from clipquant.files import write_whole
from clipquant.report.page import render_page
from clipquant.report.plots import counted
from clipquant.report.record import QuantizationReport
from clipquant.shown import shown

JSON_FILE, PAGE_FILE = "report.json", "report.html"
_PACKAGES = ("clipquant", "torch", "lightning", "torchmetrics", "safetensors")


def write_report(report: QuantizationReport, folder: str | Path) -> tuple[Path, Path]:
    """Write `report.json` and `report.html` into `folder`, each whole or not at all.

    Both are tried; one that cannot be written leaves what stood there.

    Args:
        report: What to write.
        folder: Its folder.

    Returns:
        The two paths.

    Raises:
        OSError: If one of them cannot be written; names it.
    """
    record, page = Path(folder, JSON_FILE), Path(folder, PAGE_FILE)
    texts = {record: json.dumps(report.to_dict(), indent=1) + "\n", page: render_page(report)}
    failed = {path: error for path, text in texts.items() if (error := _failure(path, text))}
    if failed:
        names = " and ".join(map(shown, failed))
        first = next(iter(failed.values()))
        raise PlaceError(
            first.errno,
            f"{names} could not be written ({first.strerror or first}); the quantized model is whole, and "
            "`clipquant report FILE --html OUT` makes its page again",
        ) from first
    return record, page


def _failure(path: Path, text: str) -> OSError | None:
    """Write a text whole; return why it could not be."""
    try:
        write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        return error
    return None


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
