"""The picture of `quantize_quality.py`: what is lost against the bytes of the file, a line for each quantizer."""

from itertools import groupby

STYLES = {  # ours in warm colours and full lines, the peers in cold ones and dashed
    "clipquant rtn": ("#b8860b", "-"),
    "clipquant mse": ("#e67e22", "-"),
    "clipquant hqq": ("#d35fb7", "-"),
    "clipquant gptq": ("#c0392b", "-"),
    "clipquant adaround": ("#7b1e3a", "-"),
    "clipquant distill": ("#d1495b", "-"),
    "optimum-quanto": ("#1f77b4", "--"),
    "torchao": ("#17a2b8", "--"),
    "hqq axis 1": ("#2e8b57", "--"),
    "hqq axis 0": ("#7cb342", "--"),
    "auto-round": ("#4b4bb0", "--"),
}
TITLES = {
    "twoconv": "TwoConvNet, accuracy on Fashion-MNIST",
    "albert": "ALBERT, masked tokens of reactions restored",
}
DROPS = (0, 0.1, 0.3, 1, 3, 10, 30, 100)
LINEAR = 0.1  # points: below, the axis is linear, since a drop may be 0 or less


def draw(results, path):
    from matplotlib import pyplot as plt

    networks = {n: list(rows) for n, rows in groupby(_ordered(results), lambda r: r.network)}
    figure, panels = plt.subplots(
        1, len(networks), figsize=(7.5 * len(networks), 6), squeeze=False, layout="constrained"
    )
    for panel, (network, rows) in zip(panels[0], networks.items(), strict=True):
        _draw_network(panel, network, rows)
    figure.savefig(path, dpi=110)


def _ordered(results):
    return sorted(results, key=lambda r: (r.network != "twoconv", r.network, r.who, r.bits))


def _draw_network(panel, network, rows):
    base = next(row for row in rows if row.who == "float")
    lines = {w: list(g) for w, g in groupby(rows, lambda r: r.who) if w in STYLES}
    for who, points in lines.items():
        color, dash = STYLES[who]
        sizes = [row.size_bytes / 1e3 for row in points]
        drops = [_drop(row, base) for row in points]
        panel.plot(sizes, drops, dash, color=color, marker="o", markersize=4, linewidth=1.6)
        for row, size, drop in zip(points, sizes, drops, strict=True):
            panel.annotate(
                str(row.bits), (size, drop), (4, 4), textcoords="offset points", fontsize=7,
                color=color,
            )  # fmt: skip
    panel.set_xscale("log")
    panel.set_yscale("symlog", linthresh=LINEAR, linscale=0.5)
    _ticks(panel, lines, base)
    _name_lines(panel, lines, base)
    panel.set_title(f"{TITLES[network]}: float {base.quality:.2%}, {base.size_bytes / 1e3:,.0f} kB")
    panel.set_xlabel("bytes of the file, kB (a number at a point: bits)")
    panel.set_ylabel("points lost (up is better)")


def _drop(row, base):
    return 100 * (base.quality - row.quality)


def _ticks(panel, lines, base):
    from matplotlib.ticker import FixedLocator, NullLocator

    drops = [_drop(row, base) for points in lines.values() for row in points]
    panel.set_ylim(1.4 * max(drops), min(-LINEAR, min(drops) - LINEAR / 2))
    panel.yaxis.set_major_locator(FixedLocator([d for d in DROPS if d <= max(drops)]))
    panel.yaxis.set_major_formatter(lambda drop, _: f"{drop:g}")
    sizes = [row.size_bytes / 1e3 for points in lines.values() for row in points]
    low, high = min(sizes), max(sizes)
    panel.set_xlim(low / 1.9, 1.8 * high)  # room on both sides for the names
    steps = (100, 150, 200, 300, 400, 600, 800, 1200, 1600, 2400, 4800)
    panel.xaxis.set_major_locator(FixedLocator([s for s in steps if low / 1.3 <= s <= high * 1.1]))
    panel.xaxis.set_major_formatter(lambda size, _: f"{size:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.grid(alpha=0.25)


def _name_lines(panel, lines, base):
    """Write each name level with its line's narrowest point, ours on the left and the peers' on the right."""
    panel.figure.canvas.draw()
    left, right = panel.get_xlim()
    ours = {who: points for who, points in lines.items() if who.startswith("clipquant")}
    peers = {who: points for who, points in lines.items() if who not in ours}
    _name_side(panel, ours, base, 1.02 * left, "left")
    _name_side(panel, peers, base, right / 1.02, "right")


def _name_side(panel, lines, base, edge, side):
    height = 12 * panel.figure.dpi / 72  # of a line of text: names do not overlap
    ends = {who: (row[0].size_bytes / 1e3, _drop(row[0], base)) for who, row in lines.items()}
    pixels = {who: panel.transData.transform(end)[1] for who, end in ends.items()}
    place = -height
    for who in sorted(ends, key=pixels.get):
        place = max(pixels[who], place + height)
        level = panel.transData.inverted().transform((0, place))[1]
        color = STYLES[who][0]
        panel.annotate(
            lines[who][0].label, ends[who], (edge, level), color=color, fontsize=9, va="center", ha=side,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5, "alpha": 0.5},
        )  # fmt: skip
