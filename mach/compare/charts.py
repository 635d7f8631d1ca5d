"""Charts of a comparison, as SVG to stand inside an HTML page: no scripts, nothing loaded, colours from the page's CSS.

Text stays text and takes the page's font. Colours are CSS variables, so that one drawing serves a light and a dark page:
matplotlib draws with the stand-ins of `COLOURS`, which are replaced afterwards.
"""

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from mach.compare.rows import PARTS, Row, percent, plain, scaled
from mach.draw import INK, LINE, MUTED, PALETTE

FULL, CARD = "#6f7781", "#fefefe"  # a full head is grey, the line to beat
COLOURS = {colour: f"var(--c{i})" for i, colour in enumerate(PALETTE)} | {
    FULL: "var(--full)", INK: "var(--ink)", MUTED: "var(--muted)", LINE: "var(--line)", CARD: "var(--card)",
}  # fmt: skip
MARKERS = "oDs^vP"
WIDTH = 13.0  # inches of 72 pixels, about the width of the page: 12 points of type are 12 pixels there


def colours(rows: Sequence[Row]) -> list[str]:
    """Give each row its colour: grey for a full head, the palette in turn for the others."""
    hashed = [i for i, row in enumerate(rows) if not row.is_full]
    return [FULL if row.is_full else PALETTE[hashed.index(i) % len(PALETTE)] for i, row in enumerate(rows)]


def precision_keys(rows: Sequence[Row]) -> list[str]:
    """List the P@k that any row has, k rising."""
    keys = {key for row in rows for key in row.metrics if key.startswith("P@")}
    return sorted(keys, key=lambda key: int(key.removeprefix("P@")))


def precision_chart(rows: Sequence[Row]) -> str:
    """Draw P@k of each row as a dot, a panel for each k; the axes do not begin at 0."""
    keys = precision_keys(rows)
    figure, panels = _panels(rows, 1, len(keys))
    for panel, key in zip(panels, keys, strict=True):
        values = [row.metrics.get(key) for row in rows]
        known = [100 * value for value in values if value is not None]
        room = max(max(known) - min(known), 0.5)
        panel.set_xlim(min(known) - 0.15 * room, max(known) + 0.45 * room)
        panel.hlines(range(len(rows)), *panel.get_xlim(), color=LINE, linewidth=1, zorder=0)
        best = max(known)
        for y, (value, colour) in enumerate(zip(values, colours(rows), strict=True)):
            if value is not None:
                panel.plot(100 * value, y, "o", color=colour, markersize=9)
                _note(panel, 100 * value, y, percent(value), bold=100 * value == best, dx=9)
        panel.set_title(f"{key}, %", loc="left", color=INK, fontsize=13, fontweight="bold")
    alt = "; ".join(f"{key}: " + ", ".join(f"{row.name} {percent(row.metrics.get(key))} %" for row in rows) for key in keys)
    return _svg(figure, "precision", alt)


def cost_chart(rows: Sequence[Row]) -> str:
    """Draw what each row costs as bars from 0: training, parameters, bytes, memory, prediction, decoding."""
    costs: list[tuple[str, Callable[[Row], float], Callable[[Row], str]]] = [
        ("Training, s", lambda row: row.train_s, lambda row: plain(row.train_s, "s")),
        ("Parameters", lambda row: row.parameters, lambda row: scaled(row.parameters)),
        ("Model on disk", lambda row: row.bytes, lambda row: scaled(row.bytes, "B")),
        ("Peak memory", lambda row: row.peak_bytes, lambda row: scaled(row.peak_bytes, "B")),
        ("Prediction, ms a query", lambda row: row.predict_ms, lambda row: plain(row.predict_ms, "ms")),
        ("Decoding alone, ms a query", lambda row: row.decode_ms, lambda row: plain(row.decode_ms, "ms")),
    ]
    figure, panels = _panels(rows, 2, 3)
    for panel, (title, value, text) in zip(panels, costs, strict=True):
        values = [value(row) for row in rows]
        panel.barh(range(len(rows)), values, height=0.5, color=colours(rows))
        panel.set_xlim(0, 1.32 * max(*values, 1e-12))
        for y, row in enumerate(rows):
            _note(panel, values[y], y, text(row), bold=values[y] == min(values), dx=5)
        panel.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold")
        panel.xaxis.set_visible(False)
    alt = "; ".join(f"{title}: " + ", ".join(f"{row.name} {text(row)}" for row in rows) for title, _, text in costs)
    return _svg(figure, "cost", alt)


def part_names(rows: Sequence[Row]) -> list[str]:
    """List the parts of training that took time in any row, in the order of a step."""
    known = {name for row in rows for name in row.time_by_part}
    return [name for name in (*PARTS, "rest") if name in known]


def parts_chart(rows: Sequence[Row]) -> str | None:
    """Draw the seconds of training of each row as one bar, part by part; None if none were measured."""
    names = part_names(rows)
    if not names:
        return None
    figure, (panel,) = _panels(rows, 1, 1)
    left = [0.0] * len(rows)
    for name, colour in zip(names, _part_colours(names), strict=True):
        widths = [row.time_by_part.get(name, 0.0) for row in rows]
        panel.barh(range(len(rows)), widths, left=left, height=0.5, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for y, end in enumerate(left):
        _note(panel, end, y, plain(end, "s"), bold=end == min(left), dx=5)
    panel.set_xlim(0, 1.12 * max(left))
    panel.xaxis.set_visible(False)
    panel.legend(frameon=False, fontsize=12, labelcolor=INK, ncols=len(names), loc="lower left", bbox_to_anchor=(0, 1))
    alt = "; ".join(
        f"{row.name}: " + ", ".join(f"{name} {plain(row.time_by_part.get(name, 0.0), 's')}" for name in names) for row in rows
    )
    return _svg(figure, "parts", alt)


def _part_colours(names: Sequence[str]) -> list[str]:
    """Give each part its colour, the same in every report."""
    return [FULL if name == "rest" else PALETTE[list(PARTS).index(name)] for name in names]


def repetitions_chart(rows: Sequence[Row]) -> str | None:
    """Draw P@k against the number of repetitions decoded with; None if no row was decoded with more than one number."""
    curves = [row for row in rows if len(row.by_repetitions) > 1]
    if not curves:
        return None
    keys = precision_keys(rows)
    figure, panels = _figure(4.1, 1, len(keys))
    numbers = sorted({r for row in curves for r, _ in row.by_repetitions})
    for panel, key in zip(panels, keys, strict=True):
        ends = _draw_curves(panel, rows, key, numbers)
        panel.set_title(f"{key}, %", loc="left", color=INK, fontsize=13, fontweight="bold")
        panel.set_xlabel("repetitions decoded with", color=MUTED, fontsize=12)
        if panel is panels[-1]:
            _name_curves(panel, ends, numbers[-1])
    alt = "; ".join(
        f"{key} of {row.name} by repetitions: " + ", ".join(f"{r}: {percent(m.get(key))} %" for r, m in row.by_repetitions)
        for key in keys
        for row in curves
    )
    return _svg(figure, "repetitions", alt)


def _draw_curves(panel: Any, rows: Sequence[Row], key: str, numbers: list[int]) -> list[tuple[float, str, str]]:
    """Draw a line with markers for each ensemble, a dashed level for each full head; give (last value, name, colour) of each."""
    ends = []
    for i, (row, colour) in enumerate(zip(rows, colours(rows), strict=True)):
        points = [(r, 100 * metrics[key]) for r, metrics in row.by_repetitions if key in metrics]
        if len(points) > 1:
            panel.plot(*zip(*points, strict=True), color=colour, linewidth=2, marker=MARKERS[i % len(MARKERS)], markersize=6)
            ends.append((points[-1][1], row.name, colour))
        elif row.is_full and key in row.metrics:
            level = 100 * row.metrics[key]
            panel.plot([numbers[0], numbers[-1]], [level, level], color=colour, linewidth=1.6, linestyle=(0, (5, 3)))
            ends.append((level, row.name, colour))
    powers = [r for r in numbers if r & (r - 1) == 0]
    ticks = powers if len(powers) > 1 else numbers
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, labels=map(str, ticks))
    panel.minorticks_off()
    panel.grid(axis="y", color=LINE, linewidth=1)
    panel.margins(y=0.1)
    return ends


def _name_curves(panel: Any, ends: list[tuple[float, str, str]], x: float) -> None:
    """Write the curves' names to the right of x, each near its end and none over another."""
    bottom, top = panel.get_ylim()
    ends = sorted(ends)
    for (_, name, colour), y in zip(ends, spread([end[0] for end in ends], 0.075 * (top - bottom)), strict=True):
        panel.annotate(
            _short(name), (x, y), xytext=(10, 0), textcoords="offset points", va="center", color=colour, fontsize=12,
            fontweight="bold", annotation_clip=False,
        )  # fmt: skip


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move rising values apart until neighbours are `gap` apart or more, each as little as its cluster allows."""
    clusters: list[list[float]] = []  # (first place, members)
    members: list[list[float]] = []
    for value in values:
        clusters.append([value])
        members.append([value])
        while len(members) > 1 and clusters[-1][0] < clusters[-2][0] + gap * len(members[-2]):
            joined = members.pop(-2) + members.pop()
            clusters[-2:] = [[sum(joined) / len(joined) - gap * (len(joined) - 1) / 2]]
            members.append(joined)
    return [first[0] + gap * i for first, cluster in zip(clusters, members, strict=True) for i in range(len(cluster))]


def _figure(height: float, n_down: int, n_across: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    engine = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08, wspace=0.03)
    figure = Figure(figsize=(WIDTH, height), layout=engine)
    panels = figure.subplots(n_down, n_across, squeeze=False)
    for panel in panels.flat:
        panel.set_facecolor("none")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0, labelcolor=MUTED, labelsize=12, pad=6)
    return figure, list(panels.flat)


def _panels(rows: Sequence[Row], n_down: int, n_across: int) -> tuple[Any, list[Any]]:
    """Give panels whose y axis names the rows, the first row on top."""
    figure, panels = _figure(n_down * (0.75 + 0.38 * len(rows)), n_down, n_across)
    for i, panel in enumerate(panels):
        panel.set_ylim(len(rows) - 0.5, -0.5)
        panel.set_yticks(range(len(rows)), labels=[_short(row.name) if i % n_across == 0 else "" for row in rows])
        panel.tick_params(axis="y", labelcolor=INK, labelsize=13)
    return figure, panels


def _note(panel: Any, x: float, y: float, text: str, *, bold: bool, dx: int) -> None:
    panel.annotate(
        text, (x, y), xytext=(dx, 0), textcoords="offset points", va="center", color=INK, fontsize=12,
        fontweight="bold" if bold else "normal", bbox={"facecolor": CARD, "edgecolor": "none", "pad": 1.5},
    )  # fmt: skip


def _short(name: str, n_characters: int = 26) -> str:
    """Cut a name to what fits beside a chart; a dollar is a dollar, not mathematics."""
    name = name if len(name) <= n_characters else name[: n_characters - 1] + "…"
    return name.replace("$", r"\$")


def _svg(figure: Any, key: str, alt: str) -> str:
    """Give a figure as an <svg> element that a screen reader reads as `alt`."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # the page's font has it
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"font: ((?:\w+ )*)([\d.]+)px [^;\"]*", r"font: \1\2px var(--font)", svg)
    for stand_in, variable in COLOURS.items():
        svg = svg.replace(stand_in, variable)
    return svg.replace("<svg ", f'<svg class="chart" role="img" aria-label="{html.escape(alt)}" ', 1)
