"""The report's plots as SVG: text in, text out, coloured by the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from clipquant.report.naming import distinct
from clipquant.report.record import Histogram, LayerRecord, QuantizationReport, Trial, drop_of
from clipquant.report.text import escape

WIDTH = 440  # of every plot, in its own units: about a phone's screen, so that text keeps its size
PITCH = 46  # from one layer's bar to the next
BAR = 15
MANY = 32  # values of a grid that are still told apart as lines


def histogram_plot(bars: Histogram, name: str) -> str:
    """Return the weights' histogram with the grid's levels drawn over it.

    Up to 32 levels are lines over the bars; of more only the ends are, joined by a line under the bars.
    """
    height, floor = 136, 108
    ends = (*bars.levels, bars.low, bars.high)
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return 8 + (WIDTH - 16) * (value - low) / span

    step = (bars.high - bars.low) / len(bars.counts)
    marks = [
        _rect(
            "bar",
            x(bars.low + i * step) + 0.5,
            floor - 96 * count / 63,
            max((WIDTH - 16) * step / span - 1, 1),
            96 * count / 63,
            f"{bars.low + i * step:.3g} to {bars.low + (i + 1) * step:.3g}",
        )
        for i, count in enumerate(bars.counts)
    ]
    marks += _levels(bars.levels, x, floor)
    marks.append(_line("axis", 8, floor, WIDTH - 8, floor))
    marks += [
        _text(8, height - 6, f"{low:.3g}", "start"),
        _text(WIDTH - 8, height - 6, f"{high:.3g}", "end"),
    ]
    if low < 0 < high and 60 < x(0) < WIDTH - 60:
        marks.append(_text(x(0), height - 6, "0", "middle"))
    return _svg("histogram", height, f"Histogram of {name} with its grid's levels", marks)


def _levels(levels: Sequence[float], x: Callable[[float], float], floor: float) -> list[str]:
    """Return a line a level, or where those would merge the span from the first to the last."""
    many = len(levels) > MANY
    drawn = (min(levels), max(levels)) if many else levels
    marks = [
        f'<line class="level" x1="{x(v):.1f}" x2="{x(v):.1f}" y1="4" y2="{floor + 5}"><title>{v:.4g}</title></line>'
        for v in drawn
    ]
    return (
        [*marks, _line("level", x(drawn[0]), floor + 3, x(drawn[1]), floor + 3)] if many else marks
    )


def bits_plot(layers: Sequence[LayerRecord]) -> str:
    """Return one bar a layer, divided by the share of rows that have each width."""
    marks: list[str] = []
    for layer, name, y in _places(layers):
        marks += _name(name, y, f"{layer.bits:.2f} bits")
        total = sum(layer.rows.values()) or 1
        x = 8.0
        for width, rows in sorted(layer.rows.items()):
            size = (WIDTH - 16) * rows / total
            what = f"{layer.name}: {rows} of {total} rows at {width} bits"
            marks.append(_rect(f"bar w{width}", x, y, max(size - 1, 0.5), BAR, what))
            if size > 18:
                marks.append(_text(x + size / 2, y + 11, str(width), "middle", f"in w{width}"))
            x += size
    return _svg("bits", PITCH * len(layers), "Bits of each weight's rows", marks)


def sqnr_plot(layers: Sequence[LayerRecord]) -> str:
    """Return one bar a layer, as long as its SQNR in dB; a weight kept exactly fills the width."""
    finite = [layer.sqnr_db for layer in layers if math.isfinite(layer.sqnr_db)]
    most = max([*finite, 1.0])
    marks: list[str] = []
    for layer, name, y in _places(layers):
        known = not math.isnan(layer.sqnr_db)
        said = "exact" if layer.sqnr_db == math.inf else f"{layer.sqnr_db:.1f} dB"
        marks += _name(name, y, said if known else "not recorded")
        share = min(max(layer.sqnr_db, 0.0) / most, 1.0) if known else 0.0
        size = max((WIDTH - 16) * share, 1)
        marks.append(_rect("bar", 8, y, size, BAR, f"{layer.name}: {said}"))
    return _svg("sqnr", PITCH * len(layers), "SQNR of each weight", marks)


def search_plot(report: QuantizationReport) -> str:
    """Return the measured trials of the budget search: metric against bytes, the chosen one ringed.

    Drawn with the float metric, and with the limits where they were given. Empty without trials.
    """
    trials = [
        t
        for t in (report.budget.trials if report.budget else ())
        if t.value is not None and math.isfinite(t.value)
    ]
    before = report.float_metrics.get(report.monitor or "")
    if not trials or report.budget is None or before is None:
        return ""
    limit = _limit(before, report)
    scale = _Axes([t.size_bytes for t in trials], [t.value or 0.0 for t in trials], before, limit)
    marks = [*scale.frame(report.monitor or "")]
    below = limit is not None and limit > before  # the lower of two lines has its words beneath it
    marks += scale.across(before, "float", f"float {before:.4g}", below)
    if limit is not None:
        marks += scale.across(limit, "limit", f"limit {limit:.4g}", not below)
    if report.budget.max_size is not None:
        marks += scale.down(report.budget.max_size)
    path = sorted((t for t in trials if t.what == "rows"), key=lambda t: t.size_bytes)
    points = " ".join(f"{scale.x(t.size_bytes):.1f},{scale.y(t.value or 0.0):.1f}" for t in path)
    marks.append(f'<polyline class="curve" points="{points}"/>')
    marks += [_dot(t, scale, before, report) for t in sorted(trials, key=lambda t: t.chosen)]
    return _svg("search", scale.height, "Metric against size of every trial", marks)


class _Axes:
    """The scales of the search plot: bytes on x, the metric on y."""

    height, left, floor = 250, 58, 206

    def __init__(
        self, sizes: Sequence[int], values: Sequence[float], before: float, limit: float | None
    ) -> None:
        shown = [*values, before] + ([] if limit is None else [limit])
        pad = (max(shown) - min(shown)) * 0.12 or abs(before) * 0.01 or 1.0
        self.low, self.high = min(shown) - pad, max(shown) + pad
        self.small, self.large = min(sizes) * 0.9, max(sizes) * 1.08

    def x(self, size: float) -> float:
        share = (size - self.small) / (self.large - self.small)
        return self.left + (WIDTH - 8 - self.left) * share

    def y(self, value: float) -> float:
        return self.floor - (self.floor - 14) * (value - self.low) / (self.high - self.low)

    def frame(self, monitor: str) -> Iterator[str]:
        yield _text(self.left, 10, monitor, "start")
        for tick in ticks(self.low, self.high, 5):
            yield _line("grid", self.left, self.y(tick), WIDTH - 8, self.y(tick))
            yield _text(self.left - 6, self.y(tick) + 4, f"{tick:.6g}", "end")
        yield _line("axis", self.left, self.floor, WIDTH - 8, self.floor)
        for tick in ticks(self.small, self.large, 5):
            at = self.x(tick)
            anchor = "end" if at > WIDTH - 36 else "middle"
            yield _text(
                WIDTH - 8 if anchor == "end" else at, self.floor + 18, short_bytes(tick), anchor
            )
        yield _text(WIDTH - 8, self.floor + 36, "size of the file", "end")

    def across(self, value: float, kind: str, said: str, beneath: bool) -> list[str]:
        y = self.y(value)
        return [
            _line(kind, self.left, y, WIDTH - 8, y),
            _text(self.left + 4, y + (14 if beneath else -4), said, "start", kind),
        ]

    def down(self, size: int) -> list[str]:
        if not self.small <= size <= self.large:
            return []
        x = self.x(size)
        anchor = "end" if x > WIDTH * 0.6 else "start"
        label = _text(
            x + (-5 if anchor == "end" else 5), (14 + self.floor) / 2, "size limit", anchor, "limit"
        )
        return [_line("limit", x, 14, x, self.floor), label]


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two values, at most about `most` of them.

    >>> ticks(0.0, 1.0, 5)
    [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    """
    raw = (high - low) / most
    if not raw > 1e-12 * max(abs(low), abs(high)):
        return [low]
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is one.

    >>> counted(1, "thread"), counted(2, "thread")
    ('1 thread', '2 threads')
    """
    return f"{number:g} {noun}" if number == 1 else f"{number:g} {noun}s"


def short_bytes(size: float) -> str:
    """Return a size in decimal units.

    >>> short_bytes(300_000), short_bytes(4_799_000), short_bytes(950)
    ('300 kB', '4.8 MB', '950 B')
    """
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return (
                f"{size / factor:.3g} {unit}"
                if size < 100 * factor
                else f"{size / factor:.0f} {unit}"
            )
    return f"{size:.0f} B"


def _limit(before: float, report: QuantizationReport) -> float | None:
    allowed = report.budget.max_drop if report.budget else None
    if allowed is None:
        return None
    return before - allowed if report.mode == "max" else before + allowed


def _dot(trial: Trial, scale: _Axes, before: float, report: QuantizationReport) -> str:
    value = trial.value if trial.value is not None else math.nan
    kind = f"dot {trial.what}" + (" chosen" if trial.chosen else "")
    drop = drop_of(before, value, report.mode)
    said = f"{trial.size_bytes:,} bytes: {value:.6g} (drop {drop:.4g}), {trial.what}"
    mark = (
        f'<circle class="{kind}" cx="{scale.x(trial.size_bytes):.1f}" cy="{scale.y(value):.1f}" '
        f'r="{6 if trial.chosen else 4}"><title>{escape(said)}</title></circle>'
    )
    if not trial.chosen:
        return mark
    x, y = scale.x(trial.size_bytes), scale.y(value)
    anchor = "end" if x > WIDTH * 0.6 else "start"
    return mark + _text(x, y + 20, f"chosen {value:.4g}", anchor, "said")


def _places(layers: Sequence[LayerRecord]) -> Iterator[tuple[LayerRecord, str, float]]:
    """Yield each weight, the part of its name that tells it from the others, and where it is drawn."""
    names = distinct([layer.name for layer in layers], ends=False)
    for i, (layer, name) in enumerate(zip(layers, names, strict=True)):
        yield layer, name if len(layers) > 1 else layer.name, PITCH * i + 22


def _name(full: str, y: float, said: str) -> list[str]:
    name = full if len(full) <= 38 else f"{full[:16]}...{full[-19:]}"
    return [_text(8, y - 6, name, "start", "said"), _text(WIDTH - 8, y - 6, said, "end")]


def _svg(kind: str, height: float, label: str, marks: Sequence[str]) -> str:
    return (
        f'<svg class="plot {kind}" viewBox="0 0 {WIDTH} {height:g}" role="img" '
        f'aria-label="{escape(label, quote=True)}">{"".join(marks)}</svg>'
    )


def _rect(kind: str, x: float, y: float, width: float, height: float, title: str) -> str:
    return (
        f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}">'
        f"<title>{escape(title)}</title></rect>"
    )


def _line(kind: str, x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _text(x: float, y: float, said: str, anchor: str, kind: str = "") -> str:
    return (
        f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}</text>'
    )
