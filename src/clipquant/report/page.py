"""The report as one self-contained HTML page: no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from importlib.resources import files
from string import Template

from clipquant.report import plots
from clipquant.report.digits import pair
from clipquant.report.exports import Remark, export_remarks
from clipquant.report.plots import counted, short_bytes
from clipquant.report.record import Histogram, LayerRecord, QuantizationReport
from clipquant.report.sheets import exports_sheet, left_sheets, trials_sheet, weights_sheet
from clipquant.report.text import breakable, escape

MOST = 24  # weights that are drawn; a table lists them all


def render_page(report: QuantizationReport) -> str:
    """Return the whole page as text; the same report gives the same page.

    Args:
        report: What to show.
    """
    template = Template(files("clipquant.report").joinpath("page.html").read_text("utf-8"))
    sections = (
        _search(report),
        _weights(report),
        _bars(report),
        _histograms(report),
        _exports(report),
        _left(report),
        _provenance(report),
    )
    return template.substitute(
        title=escape(f"Quantization report: {short_bytes(report.size_bytes)}"),
        headline=breakable(_headline(report)),
        state=_state(report),
        verdict=breakable(report.verdict),
        worries=_worries(report),
        tiles="".join(_tiles(report)),
        sections="".join(sections),
    )


def _headline(report: QuantizationReport) -> str:
    sizes = f"{short_bytes(report.float_bytes)} to {short_bytes(report.size_bytes)}"
    if report.monitor is None or report.drop is None:
        return sizes
    before, after = pair(
        report.float_metrics[report.monitor], report.quantized_metrics[report.monitor]
    )
    return f"{sizes}, {report.monitor} {before} to {after}"


def _state(report: QuantizationReport) -> str:
    if report.suspicion or report.harmed:
        return "missed"
    if report.budget is None:
        return "none"
    return "met" if report.budget.met else "missed"


def _worries(report: QuantizationReport) -> str:
    """Return what is to be looked at and does not stand in the verdict."""
    rest = [worry for worry in report.worries if worry.rstrip(".") not in report.verdict]
    items = "".join(f"<li>{breakable(worry)}</li>" for worry in rest)
    return f'<div class="worries"><h2>Look at</h2><ul>{items}</ul></div>' if rest else ""


def _tiles(report: QuantizationReport) -> list[str]:
    """Return the figures at the top: each metric on the same batches, size, ratio, width, time."""
    tiles = [_metric_tile(report, name) for name in report.metric_names[:6]]
    tiles += [
        _tile(
            "size of the file",
            short_bytes(report.size_bytes),
            f"{report.size_bytes:,} of {report.float_bytes:,} bytes",
        ),
        _ratio_tile(report.ratio),
        _tile("bits per weight", f"{report.bits_per_weight:.2f}", "scales included, float has 32"),
    ]
    timed = report.latency
    if timed is not None:
        note = f"float {timed.float_ms:.3g} ms; {timed.what}, batch {timed.batch}, {counted(timed.threads, 'thread')}"
        tiles.append(_tile("median latency", f"{timed.quantized_ms:.3g} ms", note))
    return tiles


def _metric_tile(report: QuantizationReport, name: str) -> str:
    before, after = pair(
        report.float_metrics.get(name, math.nan), report.quantized_metrics.get(name, math.nan)
    )
    return _tile(name, after, f"float {before}, same batches")


def _ratio_tile(ratio: float) -> str:
    if ratio >= 1:
        return _tile("smaller", f"{ratio:.2f}x", "float bytes over file bytes")
    return _tile("larger", f"{1 / ratio:.2f}x", "file bytes over float bytes")


def _tile(what: str, value: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="what">{breakable(what)}</div>'
        f'<div class="value">{escape(value)}</div><div class="note">{escape(note)}</div></div>'
    )


def _search(report: QuantizationReport) -> str:
    plot = plots.search_plot(report)
    if not plot or report.budget is None:
        return ""
    measured = [trial for trial in report.budget.trials if trial.value is not None]
    why = (
        f"Each dot is an allocation of bits that was measured on the validation data ({len(measured)} "
        "in all); the green one is the file. An open dot has one width for all weights."
    )
    table = trials_sheet(report, measured)
    return _card("The search for the budget", why, f'<div class="pair flat">{plot}{table}</div>')


def _weights(report: QuantizationReport) -> str:
    if not report.layers:
        return _card("Weights", "No weight was quantized.", "")
    why = "SQNR is the signal to noise ratio of the rounding"
    if any(layer.sensitivity is not None for layer in report.layers):
        why += ", sensitivity the expected rise of the loss by it"
    return _card("Weights", f"{why}. Click a heading to sort.", weights_sheet(report))


def _bars(report: QuantizationReport) -> str:
    """Return the widths, where they differ, and the SQNR of weights; of many those that say most."""
    layers = report.layers
    if not layers:
        return ""
    worst = _first(
        layers, lambda layer: layer.sqnr_db if layer.sqnr_db == layer.sqnr_db else math.inf
    )
    cards = [
        _card(
            "Signal to noise",
            f"SQNR in dB: longer is closer to the float weight.{_of(layers, 'lowest')}",
            plots.sqnr_plot(worst),
        )
    ]
    if len({width for layer in layers for width in layer.rows}) > 1:
        why = f"Share of each weight's output channels at each width.{_of(layers, 'largest')}"
        cards.insert(0, _card("Bits", why, plots.bits_plot(_largest(layers))))
    return f'<div class="pair">{"".join(cards)}</div>'


def _first(layers: Sequence[LayerRecord], key: Callable[[LayerRecord], float]) -> list[LayerRecord]:
    """Return the weights of smallest key, where there are too many to draw, in the network's order."""
    kept = {layer.name for layer in sorted(layers, key=key)[:MOST]}
    return [layer for layer in layers if layer.name in kept]


def _largest(layers: Sequence[LayerRecord]) -> list[LayerRecord]:
    return _first(layers, lambda layer: -layer.bytes)


def _of(layers: Sequence[LayerRecord], which: str) -> str:
    """Return which weights are drawn, where not all are."""
    return f" The {MOST} {which} of {len(layers)} weights." if len(layers) > MOST else ""


def _histograms(report: QuantizationReport) -> str:
    known = [layer for layer in report.layers if layer.histogram is not None]
    if not known:
        return ""
    figures = "".join(map(_histogram, sorted(_largest(known), key=lambda layer: -layer.bytes)))
    why = (
        "The float weights in blue, and over them the values that codes stand for in one output channel, the one "
        f"of median step; channels are counted from 0.{_of(known, 'largest')}"
    )
    return _card("Weights and their grids", why, f'<div class="many">{figures}</div>')


def _histogram(layer: LayerRecord) -> str:
    bars = layer.histogram
    if bars is None:
        return ""
    return (
        f"<figure><h3>{breakable(layer.name)}</h3>{plots.histogram_plot(bars, layer.name)}"
        f"<figcaption>{_grid_said(layer, bars)}</figcaption></figure>"
    )


def _grid_said(layer: LayerRecord, bars: Histogram) -> str:
    """Return whose grid is drawn, and its step where its values are too many to be."""
    values, channels = bars.levels, sum(layer.rows.values())
    said = counted(len(values), "value")
    if len(values) > plots.MANY:
        step = (max(values) - min(values)) / (len(values) - 1)
        said += f" in steps of {step:.3g}"
    return f"{said} (channel {bars.row} of {channels})" if channels > 1 else said


def _exports(report: QuantizationReport) -> str:
    if not report.exports:
        return ""
    remarks = "".join(map(_remark, export_remarks(report)))
    why = (
        "Files that run without this package; metrics and times are those of the files themselves."
    )
    return _card("Exports", why, exports_sheet(report) + remarks)


def _remark(remark: Remark) -> str:
    first, *rest = remark.lines
    kind = "remarks failed" if remark.failed else "remarks"
    items = "".join(f"<li>{breakable(line)}</li>" for line in rest)
    return f'<div class="{kind}"><p>{breakable(first)}</p><ul>{items}</ul></div>'.replace(
        "<ul></ul>", ""
    )


def _left(report: QuantizationReport) -> str:
    if not report.left:
        return ""
    total = sum(item.bytes for item in report.left)
    why = f"{counted(len(report.left), 'tensor')}, {total:,} bytes in all, and why."
    return _card("Left in float", why, left_sheets(report.left))


def _provenance(report: QuantizationReport) -> str:
    entries = [
        ("file", report.path),
        ("sha256", report.sha256),
        ("calibration data", report.calibration or "none: chosen from the weights alone"),
        ("seed", report.seed),
        *report.environment.items(),
    ]
    timed = report.latency
    if timed is not None:
        said = (
            f"{timed.float_ms:.2f} ms before, {timed.quantized_ms:.2f} ms after: median of a "
            f"{timed.what}, batch {timed.batch}, {counted(timed.threads, 'thread')}, torch, weights dequantized"
        )
        entries.append(("latency", said))
    return _card("How it was made", "", _list(entries))


def _list(entries: Sequence[tuple[str, object]]) -> str:
    shown = (
        f"<dt>{escape(name)}</dt><dd>{breakable(value)}</dd>"
        for name, value in entries
        if value not in (None, "")
    )
    return f"<dl>{''.join(shown)}</dl>"


def _card(title: str, why: str, body: str) -> str:
    said = f'<p class="why">{escape(why)}</p>' if why else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{said}{body}</section>'
