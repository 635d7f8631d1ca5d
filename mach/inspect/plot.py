"""A run's history as a figure: loss, validation, speed, memory and the time by part, over the time of training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mach.draw import INK, LINE, MUTED, PALETTE
from mach.errors import ConfigError, ModelError
from mach.inspect.history import History

ENDINGS = (".png", ".svg", ".pdf")
N_BINS = 100  # of the time by part, at most
PANELS = [  # key of the log, title, scale
    ("loss", "Loss, nats a sample", 1.0),
    ("P@1", "Validation P@1, %", 100.0),
    ("samples_per_s", "Samples a second", 1.0),
    ("bytes", "Memory, MB", 1e-6),
]


def plot(histories: Sequence[History], path: str | Path) -> None:
    """Draw groups into a file, a line each; the time by part is that of all of them, dashed lines are stops.

    Raises: ConfigError for another ending than .png, .svg or .pdf; ModelError if nothing is logged yet or the disk refuses.
    """
    check_ending(path)
    histories = [history for history in histories if history.steps]
    if not histories:
        raise ModelError("there is no step in the run's logs yet: nothing to draw")
    figure, panels = _panels(len(PANELS) + 1)
    for panel, (key, title, scale) in zip(panels, PANELS, strict=False):
        _lines(panel, histories, key, scale)
        panel.set_title(title, loc="left", color=INK, fontsize=12, fontweight="bold")
    if len(histories) > 1:
        panels[0].legend(frameon=False, fontsize=9, labelcolor=MUTED, ncols=4)
    _parts(panels[-1], histories)
    panels[-1].set_xlim(left=0)
    panels[-1].set_xlabel("seconds of training", color=MUTED, fontsize=11)
    for i, history in enumerate(histories):
        for line in history.events:
            if line["event"] == "stopped":
                for panel in panels:
                    panel.axvline(line["wall_s"], color=_colour(i), linewidth=1, linestyle=(0, (5, 3)))
    save(figure, path)


def check_ending(path: str | Path) -> None:
    """Raise ConfigError unless a figure's file ends as one that can be drawn."""
    if Path(path).suffix not in ENDINGS:
        raise ConfigError(f"plot={str(path)!r} must end with one of {', '.join(ENDINGS)}")


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; ModelError if the disk refuses."""
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise ModelError(f"{path}: the figure cannot be written ({error.strerror})") from error


def _lines(panel: Any, histories: Sequence[History], key: str, scale: float) -> None:
    """Draw a figure of the log over the time of training, a line a group."""
    from matplotlib.ticker import LogLocator

    for i, history in enumerate(histories):
        series = history.series(key)
        xs, ys = [line.get("wall_s", 0.0) for line, _ in series], [scale * value for _, value in series]
        marker = "o" if len(xs) < 30 else None
        panel.plot(xs, ys, color=_colour(i), linewidth=1.6, marker=marker, markersize=4, label=history.name)
    if key == "loss":
        panel.set_yscale("log")
        panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.minorticks_off()
    else:
        panel.set_ylim(bottom=0)
        panel.yaxis.set_major_formatter("{x:,.0f}")


def _colour(i: int) -> str:
    return PALETTE[i % len(PALETTE)]


def _parts(panel: Any, histories: Sequence[History]) -> None:
    """Draw the share of each part in the time of all groups, stacked."""
    edges, shares = parts_over_time(histories)
    bottom = np.zeros(len(edges) - 1)
    for i, (part, share) in enumerate(shares.items()):
        panel.bar(edges[:-1], share, np.diff(edges), bottom, align="edge", color=_colour(i), label=part)
        bottom += share
    panel.set_ylim(0, 100)
    panel.set_title("Time by part, %", loc="left", color=INK, fontsize=12, fontweight="bold")
    if shares:
        panel.legend(frameon=False, fontsize=9, labelcolor=MUTED, ncols=len(shares), loc="lower left", bbox_to_anchor=(0.2, 0.97))


def parts_over_time(histories: Sequence[History]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Cut the time of training into equal bins; give their edges and each part's percentage in each, the longest part first."""
    lines = [line for history in histories for line in history.steps if line.get("parts_s")]
    walls = np.array([line["wall_s"] for line in lines])
    n_bins = int(np.clip(len(lines) // (4 * max(1, len(histories))), 1, N_BINS))
    edges = np.linspace(0, max(walls.max(initial=0.0), 1e-9), n_bins + 1)
    names = {part for line in lines for part in line["parts_s"]}
    seconds = {part: np.histogram(walls, edges, weights=[line["parts_s"].get(part, 0.0) for line in lines])[0] for part in names}
    total = np.maximum(sum(seconds.values(), np.zeros(n_bins)), 1e-12)
    return edges, {part: 100 * seconds[part] / total for part in sorted(names, key=lambda part: -seconds[part].sum())}


def _panels(n: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 2.2 * n), layout="constrained")
    panels = list(figure.subplots(n, 1, sharex=True))
    for panel in panels:
        panel.spines[:].set_visible(False)
        panel.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=10)
        panel.grid(axis="y", color=LINE, linewidth=0.8)
        panel.set_axisbelow(True)
    return figure, panels
