"""The report as one self-contained HTML page: no network, light and dark, readable on a phone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.resources import files
from string import Template

from clipquant.report import plots
from clipquant.report.exports import EXPORT_HEADER, Remark, export_remarks, export_rows
from clipquant.report.plots import counted, short_bytes
from clipquant.report.record import LayerRecord, QuantizationReport, Trial, drop_of
from clipquant.report.table import figure
from clipquant.report.text import escape

_COLUMNS = (
    ("weight", "text"),
    ("shape", "number"),
    ("bits", "number"),
    ("method", "text"),
    ("SQNR dB", "number"),
    ("sensitivity", "number"),
    ("bytes", "number"),
    ("share of file", "number"),
)
MAX_HISTOGRAMS = 64


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
        headline=escape(_headline(report)),
        state=_state(report),
        verdict=escape(report.verdict),
        tiles="".join(_tiles(report)),
        sections="".join(sections),
    )


def _headline(report: QuantizationReport) -> str:
    sizes = f"{short_bytes(report.float_bytes)} to {short_bytes(report.size_bytes)}"
    if report.monitor is None or report.drop is None:
        return sizes
    before = report.float_metrics[report.monitor]
    after = report.quantized_metrics[report.monitor]
    return f"{sizes}, {report.monitor} {before:.4g} to {after:.4g}"


def _state(report: QuantizationReport) -> str:
    if report.budget is None:
        return "none"
    return "met" if report.budget.met else "missed"


def _tiles(report: QuantizationReport) -> list[str]:
    """Return the figures at the top: each metric on the same batches, size, ratio, width, time."""
    names = sorted(report.float_metrics, key=lambda name: name != report.monitor)
    tiles = [
        _tile(
            name,
            f"{report.quantized_metrics.get(name, math.nan):.4g}",
            f"float {report.float_metrics[name]:.4g}, same batches",
        )
        for name in names[:6]
    ]
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


def _ratio_tile(ratio: float) -> str:
    if ratio >= 1:
        return _tile("smaller", f"{ratio:.2f}x", "float bytes over file bytes")
    return _tile("larger", f"{1 / ratio:.2f}x", "file bytes over float bytes")


def _tile(what: str, value: str, note: str) -> str:
    return (
        f'<div class="tile"><div class="what">{escape(what)}</div>'
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
    rows = "".join(
        _trial(trial, report) for trial in sorted(measured, key=lambda trial: -trial.size_bytes)
    )
    heads = f"<th>bytes</th><th>{escape(report.monitor or '')}</th><th>drop</th><th>bits</th>"
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    return _card("The search for the budget", why, f'<div class="pair flat">{plot}{table}</div>')


def _trial(trial: Trial, report: QuantizationReport) -> str:
    value = math.nan if trial.value is None else trial.value
    drop = drop_of(report.float_metrics[report.monitor or ""], value, report.mode)
    bits = "one width" if trial.what == "uniform" else "by row"
    kind = ' class="chosen"' if trial.chosen else ""
    cells = (f"{trial.size_bytes:,}", f"{value:.6g}", f"{drop:.4g}", bits)
    return f"<tr{kind}>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _weights(report: QuantizationReport) -> str:
    heads = "".join(
        f'<th scope="col" data-kind="{kind}"><button type="button">{escape(name)}</button></th>'
        for name, kind in _COLUMNS
    )
    rows = "".join(_row(layer, report) for layer in report.layers)
    table = (
        f'<div class="scroll names"><table class="sortable"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    why = (
        "SQNR is the signal to noise of the rounding; sensitivity the expected rise of the loss by it. "
        "Click a heading to sort."
    )
    return _card("Weights", why, table)


def _row(layer: LayerRecord, report: QuantizationReport) -> str:
    share = layer.bytes / report.size_bytes
    note = f'<br><span class="note">{escape(layer.note)}</span>' if layer.note else ""
    cells = (
        (layer.name, escape(layer.name) + note),
        (math.prod(layer.shape), " x ".join(map(str, layer.shape))),
        (layer.bits, f"{layer.bits:.2f}".removesuffix(".00")),
        (layer.method, escape(layer.method)),
        (_key(layer.sqnr_db), figure(layer.sqnr_db, ".1f")),
        (_key(layer.sensitivity), figure(layer.sensitivity, ".2e")),
        (layer.bytes, f"{layer.bytes:,}"),
        (share, f"{share:.1%}"),
    )
    return "<tr>" + "".join(_cell(key, shown) for key, shown in cells) + "</tr>"


def _cell(key: float | str, shown: str) -> str:
    return f'<td data-key="{escape(str(key), quote=True)}">{shown}</td>'


def _key(value: float | None) -> float | str:
    """Return what the browser sorts by: JavaScript's spelling of infinity, missing as lowest."""
    if value is None or math.isnan(value):
        return "-Infinity"
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def _bars(report: QuantizationReport) -> str:
    layers = report.layers
    bits = _card(
        "Bits", "Share of each weight's output channels at each width.", plots.bits_plot(layers)
    )
    sqnr = _card(
        "Signal to noise",
        "SQNR in dB: longer is closer to the float weight.",
        plots.sqnr_plot(layers),
    )
    return f'<div class="pair">{bits}{sqnr}</div>'


def _histograms(report: QuantizationReport) -> str:
    shown = [layer for layer in report.layers if layer.histogram is not None]
    if not shown:
        return ""
    shown = sorted(shown, key=lambda layer: -layer.bytes)[:MAX_HISTOGRAMS]
    figures = "".join(_histogram(layer) for layer in shown)
    why = (
        "The float weights, and over them the values of one grid: that of the output channel of median "
        "step (every channel has its own)."
    )
    return _card("Weights and their grids", why, f'<div class="many">{figures}</div>')


def _histogram(layer: LayerRecord) -> str:
    bars = layer.histogram
    if bars is None:
        return ""
    said = f"{len(bars.levels)} levels of row {bars.row}"
    return (
        f"<figure><h3>{escape(layer.name)}</h3>{plots.histogram_plot(bars, layer.name)}"
        f"<figcaption>{said}</figcaption></figure>"
    )


def _exports(report: QuantizationReport) -> str:
    if not report.exports:
        return ""
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in EXPORT_HEADER)
    rows = "".join(
        "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>"
        for row in export_rows(report)
    )
    table = f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
    remarks = "".join(map(_remark, export_remarks(report)))
    why = (
        "Files that run without this package; metrics and times are those of the files themselves."
    )
    return _card("Exports", why, table + remarks)


def _remark(remark: Remark) -> str:
    first, *rest = remark.lines
    kind = "remarks failed" if remark.failed else "remarks"
    items = "".join(f"<li>{escape(line)}</li>" for line in rest)
    return f'<div class="{kind}"><p>{escape(first)}</p><ul>{items}</ul></div>'.replace(
        "<ul></ul>", ""
    )


def _left(report: QuantizationReport) -> str:
    if not report.left:
        return ""
    rows = "".join(
        f'<tr><td>{escape(item.name)}</td><td>{item.bytes:,}</td><td class="prose">{escape(item.why)}</td></tr>'
        for item in report.left
    )
    table = (
        '<div class="scroll names"><table><thead><tr><th scope="col">tensor</th><th scope="col">bytes</th>'
        f'<th scope="col" class="prose">why</th></tr></thead><tbody>{rows}</tbody></table></div>'
    )
    total = sum(item.bytes for item in report.left)
    return _card("Left in float", f"{total:,} bytes stay as they were.", table)


def _provenance(report: QuantizationReport) -> str:
    entries = [
        ("file", report.path),
        ("sha256", report.sha256),
        ("calibration data", report.calibration or "none: chosen from the weights alone"),
        ("seed", report.seed),
        ("failed", "; ".join(report.failures)),
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
        f"<dt>{escape(name)}</dt><dd>{escape(str(value))}</dd>"
        for name, value in entries
        if value not in (None, "")
    )
    return f"<dl>{''.join(shown)}</dl>"


def _card(title: str, why: str, body: str) -> str:
    said = f'<p class="why">{escape(why)}</p>' if why else ""
    return f'<section class="card"><h2>{escape(title)}</h2>{said}{body}</section>'
