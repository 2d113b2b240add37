"""The tables, with rich and without."""

from __future__ import annotations

import builtins
from dataclasses import replace
from importlib.util import find_spec

import pytest
from torch import nn

from clipquant import quantize
from clipquant.export import ExportRecord, Timing
from clipquant.report import Latency, render_page
from clipquant.report import table as tables
from clipquant.report.exports import EXPORT_HEADER, export_rows
from clipquant.report.summary import figures_of


def report(bits: int = 4):  # type: ignore[no-untyped-def]
    made = quantize(nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 2)), bits).report
    return replace(
        made,
        float_metrics={"val_acc": 0.9, "val_loss": 0.1},
        quantized_metrics={"val_acc": 0.89},
        monitor="val_acc",
        mode="max",
        latency=Latency(1.5, 1.25, 32, 2),
        path="x.safetensors",
    )


def test_summary_has_every_metric_and_size() -> None:
    rows = {row[0]: row[1:] for row in figures_of(report())}
    assert next(iter(rows)) == "val_acc (monitored)"  # what a person wants first
    assert rows["val_acc (monitored)"] == ("0.900", "0.890", "worse by 0.01")
    assert rows["val_loss"] == ("0.100", "-", "-")
    assert not any("ms" in name for name in rows)  # both run the same kernels
    assert rows["bytes"][0] == f"{(64 * 32 + 32 + 64 + 2) * 4:,}"


def test_layers_shares_add_up_to_less_than_the_file() -> None:
    made = report()
    rows = tables.layer_rows(made)
    assert [row[0] for row in rows] == ["0.weight", "1.weight"]
    assert 0 < sum(float(row[-1].rstrip("%")) for row in rows) < 100
    assert len(rows[0]) == len(tables.LAYER_HEADER)


def test_order_of_metrics_is_one_everywhere() -> None:
    metrics = {"val_loss": 0.1, "a_metric": 3.0, "val_acc": 0.9}
    one = replace(report(), float_metrics=metrics, quantized_metrics=metrics)
    for rows in (figures_of(one), tables.compare_rows(one, one)):
        assert [row[0] for row in rows[:3]] == ["val_acc (monitored)", "a_metric", "val_loss"]
    page = render_page(one)
    tiles = [page.index(f'class="what">{name}<') for name in ("val_acc", "a_metric", "val_loss")]
    assert tiles == sorted(tiles)


@pytest.mark.parametrize("rich", [True, False])
def test_eighty_columns_break_no_name_in_mid_word_and_no_figure(
    rich: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    if not rich:
        monkeypatch.setattr(tables, "find_spec", lambda name: None)
    made = report()
    name = "sentence_encoder.layers.11.attention.output.dense.weight"
    long = replace(made, layers=(replace(made.layers[0], name=name, bytes=1_179_904),))
    long = replace(long, path="runs/version_10/quantized/model.safetensors")
    tables.print_report(long)
    tables.print_compared(long, replace(long, path="runs/version_11/quantized/model.safetensors"))
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if not line.startswith(("Artifact", "Load it"))]
    assert max(map(len, lines)) <= 80
    assert "1,179,904" in out
    assert "version_10" in next(line for line in lines if "version_11" in line)
    pieces = (
        "sentence_",
        "encoder.",
        "layers.",
        "11.",
        "attention.",
        "output.",
        "dense.",
        "weight",
    )
    broken = [word for line in lines for word in line.replace("│", " ").split() if "." in word]
    for word in broken:
        rest = word
        for piece in pieces:
            rest = rest.removeprefix(piece)
        assert rest == "" or not name.count(word), word


def test_a_pipe_gets_whole_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    tables.print_table("T", ("name", "bytes"), [("layer." * 40 + "weight", "1")])
    assert "layer." * 40 + "weight" in capsys.readouterr().out


def test_compare_lays_two_reports_side_by_side() -> None:
    one, other = report(2), report(8)
    rows = {row[0]: row[1:] for row in tables.compare_rows(one, other)}
    assert rows["bytes"] == (f"{one.size_bytes:,}", f"{other.size_bytes:,}")
    assert rows["0.weight"][0].startswith("2 bits")
    assert rows["0.weight"][1].startswith("8 bits")
    absent = replace(other, layers=other.layers[:1])
    assert {r[0]: r[2] for r in tables.compare_rows(one, absent)}["1.weight"] == "float or absent"


def test_everything_is_printed_with_rich_and_without(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    tables.print_report(report())
    rich = capsys.readouterr().out
    monkeypatch.setattr(
        tables, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    imported: list[str] = []
    original = builtins.__import__

    def spy(name: str, *args: object, **kwargs: object) -> object:
        imported.append(name)
        return original(name, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", spy)
    tables.print_report(report())
    plain = capsys.readouterr().out
    assert not any(name.startswith("rich") for name in imported)
    for said in ("val_acc (monitored)", "0.weight", "SQNR dB", "0.bias", "x.safetensors"):
        assert said in rich
        assert said in plain


def test_exports_are_rows_and_failures_say_why(capsys: pytest.CaptureFixture[str]) -> None:
    timings = (Timing(1, 0.7, 0.2, 2),)
    written = ExportRecord("onnx-int8", "q/m.onnx", 9000, 0.5, ("by MinMax",), {}, timings)
    failed = ExportRecord("pt2", error="no graph")
    made = replace(report(), exports=(written.to_dict(), failed.to_dict()))
    rows = export_rows(made)
    assert rows[0] == ("onnx-int8", "9,000", "-", "0.200 (batch 1)", "0.700 (batch 1)")
    assert rows[1] == ("pt2", "failed", "-", "-", "-")
    assert all(len(row) == len(EXPORT_HEADER) for row in rows)
    tables.print_summary(made)
    said = capsys.readouterr().out
    assert said.count("no graph") == 1
    assert "Look at: Export pt2 failed: no graph" in said
    assert "outputs within 0.5 of the quantized model's" in said
    assert "\n  by MinMax" in said
