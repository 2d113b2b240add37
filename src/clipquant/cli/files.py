"""Commands on quantized files: what they hold, whether they are whole, what they cost and gained."""

from __future__ import annotations

import argparse
import tempfile
import webbrowser
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipquant.cli.command import Command, CommandError, add_file
from clipquant.files import write_whole
from clipquant.shown import shown

if TYPE_CHECKING:
    from clipquant.artifact import Artifact
    from clipquant.report.record import QuantizationReport


def inspect_file(path: str | Path) -> int:
    """Print what a quantized file holds, a line a tensor, after proving it whole.

    Args:
        path: a file written by ``QuantizeOnFitEnd`` or ``QuantizedModel.save``.

    Returns:
        0.

    Raises:
        ArtifactError: where the file is missing, damaged, or no such file.
    """
    from clipquant.artifact import read_outline
    from clipquant.report.table import print_table

    artifact = read_outline(path)
    print_table(Path(path).name, ("name", "shape", "bits", "bytes"), list(_tensor_rows(artifact)))
    print(
        f"{Path(path).stat().st_size:,} bytes in all, format_version "
        f"{artifact.metadata.format_version}, {shown(_name_versions(artifact))}"
    )
    return 0


def verify_file(path: str | Path) -> int:
    """Print whether a quantized file is whole, or everything that is damaged in it.

    Args:
        path: the file.

    Returns:
        0 where it is whole, 1 otherwise.

    Raises:
        CommandError: where there is no such file.
    """
    from clipquant.artifact import ArtifactError, read_outline

    if not Path(path).is_file():
        raise CommandError(f"{path} is no file: pass the path of a quantized .safetensors file.")
    try:
        read_outline(path)
    except ArtifactError as damage:
        print(damage)
        return 1
    print(f"{shown(path)}: ok")
    return 0


def report_file(path: str | Path, html: str | Path | None, show: bool = False) -> int:
    """Print the report of a quantized file, or write or open it as HTML, from the file alone.

    Args:
        path: a file written by ``QuantizeOnFitEnd`` or ``QuantizedModel.save``.
        html: where to write the page; None: print tables, or open a page in a temporary folder.
        show: open the page in the browser.

    Returns:
        0.

    Raises:
        ArtifactError: where the file is missing, damaged, or no such file.
        CommandError: where no browser can be opened; says where the page is.
    """
    from clipquant.report.page import render_page
    from clipquant.report.table import print_report

    report = _read_report(path)
    if html is None and not show:
        print_report(report)
        return 0
    page = (
        Path(tempfile.mkdtemp(prefix="clipquant-"), "report.html") if html is None else Path(html)
    )
    write_whole(page, render_page(report).encode("utf-8"))
    print(f"Report: {shown(page)}")
    if show and not webbrowser.open(page.resolve().as_uri()):
        raise CommandError(
            f"no browser could be opened: open {page} yourself, or set BROWSER to the command of one."
        )
    return 0


def compare_files(one: str | Path, other: str | Path) -> int:
    """Print two quantized files side by side: size, metrics, and each weight's bits and SQNR."""
    from clipquant.report.table import print_compared

    print_compared(_read_report(one), _read_report(other))
    return 0


def _read_report(path: str | Path) -> QuantizationReport:
    from clipquant.artifact import read_outline
    from clipquant.report.stored import report_of

    artifact = read_outline(path)
    return report_of(artifact.weights, artifact.metadata, Path(path).stat().st_size, str(path))


def _tensor_rows(artifact: Artifact) -> Iterator[tuple[str, str, str, str]]:
    from clipquant.report.layers import coded_figures, stored_bytes
    from clipquant.report.table import coded_said

    weights = artifact.weights
    places = {_owner(name): place for place, name in enumerate(weights.tensors)}
    for name, tensor in weights.tensors.items():
        coded = coded_said(coded_figures(tensor)["coded_bits"])
        bits = f"{tensor.code_bits / max(tensor.numel, 1):.3g}{coded}"
        yield name, _show_shape(tensor.layout.shape), bits, f"{stored_bytes(tensor):,}"
    floats = sorted(weights.floats, key=lambda name: (places.get(_owner(name), len(places)), name))
    for name, value in ((name, weights.floats[name]) for name in floats):
        dtype = str(value.dtype).removeprefix("torch.")
        yield name, _show_shape(value.shape), dtype, f"{value.nbytes:,}"
    for alias, name in weights.aliases.items():
        yield alias, f"tied to {name}", "", "0"


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _show_shape(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape)) or "scalar"


def _name_versions(artifact: Artifact) -> str:
    versions: dict[str, str] = dict(artifact.metadata.versions)
    return "written by " + ", ".join(f"{name} {version}" for name, version in versions.items())


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="a quantized .safetensors file")
    parser.add_argument("--html", metavar="OUT", help="write the report as one HTML page instead")
    parser.add_argument("--open", action="store_true", help="open that page in the browser")


def _add_two_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("one", metavar="A", help="a quantized .safetensors file")
    parser.add_argument("other", metavar="B", help="another")


INSPECT = Command(
    "show what a quantized file holds: name, shape, bits and bytes of every tensor",
    add_file,
    lambda args: inspect_file(args.file),
    "model.safetensors",
)
VERIFY = Command(
    "say whether a quantized file is whole, or what is damaged; exit code 1 if so",
    add_file,
    lambda args: verify_file(args.file),
    "model.safetensors",
)
REPORT = Command(
    "print the report of a quantized file, or write or open it as HTML, from the file alone",
    _add_report,
    lambda args: report_file(args.file, args.html, args.open),
    "model.safetensors --html report.html",
)
COMPARE = Command(
    "lay two quantized files side by side: size, metrics, bits and SQNR of every weight",
    _add_two_files,
    lambda args: compare_files(args.one, args.other),
    "runs/a/model.safetensors runs/b/model.safetensors",
)
