"""Gather what run.py printed, for all sets and seeds, and the peers: one table of means, and a drawing of who is ahead of whom.

    cd experiments/accuracy; python table/gather.py table/measured.md table/peers.md --out accuracy.svg

Lines of a Markdown table are read, others passed over. A peer's line has no parameters and no decoding; a cell may be empty, in
all lines of a head. Where there are several seeds or runs, the mean is given, and of precision how far they lie apart.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mach.draw import INK, LINE, MUTED, PALETTE

FULL = ("full", "full-64", "full-reranked", "full-64-reranked")
HEADS = ("ours", "eight", "half", "wide", "quarter", "published", *FULL)  # the others are peers
DRAWN = {
    "ours": (PALETTE[0], "o"),
    "half": (PALETTE[5], "o"),
    "published": (PALETTE[4], "D"),
    "full": (MUTED, "s"),
    "full-64": (MUTED, "^"),
    "full-reranked": (PALETTE[1], "s"),
    "full-64-reranked": (PALETTE[1], "^"),
}
KS = (1, 3, 5)
LINEAR = 3  # points; beyond, the axis is logarithmic
Cells = dict[tuple[str, str], list[list[str]]]  # (data, head) -> lines, each of its cells after the seed


def read(paths: Iterable[Path]) -> Cells:
    """Read table lines; a later line of the same data, head and seed replaces an earlier one."""
    lines: dict[tuple[str, str, str], list[str]] = {}
    for path in paths:
        for line in path.read_text().splitlines():
            cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
            if line.startswith("| ") and len(cells) > 4 and cells[0] != "data":
                lines[cells[0], cells[1], cells[2]] = cells[3:]
    found = defaultdict(list)
    for (data, head, _), cells in lines.items():
        found[data, head].append(cells)
    return dict(found)


def numbers(cell: str) -> list[float]:
    return [float(part) for part in cell.split(" / ") if part not in ("", "-")]


def mean_cell(cells: list[str], *, spread: bool = False) -> str:
    """Write the mean of the seeds' numbers, digit for digit as they are written, and half of their range where it is wanted."""
    values = np.array([numbers(cell) for cell in cells])
    if not values.size:
        return ""
    digits = len(cells[0].split(" / ")[0].partition(".")[2])
    text = " / ".join(f"{x:.{digits}f}" for x in values.mean(0))
    return f"{text} (± {' '.join(f'{x:.1f}' for x in np.ptp(values, 0) / 2)})" if spread and len(cells) > 1 else text


def precisions(found: Cells, data: str, head: str) -> np.ndarray:
    """Give the mean P@1, P@3, P@5."""
    return np.mean([numbers(line[0]) for line in found[data, head]], 0)


def draw(found: Cells, datasets: list[str], path: Path) -> None:
    """Draw points above the best peer, a panel a metric, a row a data set."""
    figure, panels = plt.subplots(1, len(KS), figsize=(11, 0.55 * len(datasets) + 1.6), sharey=True, constrained_layout=True)
    for i, (k, panel) in enumerate(zip(KS, panels, strict=True)):
        panel.axvline(0, color=INK, linewidth=1)
        panel.hlines(range(len(datasets)), -100, 100, color=LINE, linewidth=0.8, zorder=0)
        ends = [0.0]
        for y, data in enumerate(datasets):
            best = max(precisions(found, *key)[i] for key in found if key[0] == data and key[1] not in HEADS)
            for head, (colour, marker) in reversed(DRAWN.items()):
                if (data, head) in found:
                    ends.append(precisions(found, data, head)[i] - best)
                    panel.plot(ends[-1], y, marker, color=colour, markersize=8, label=head, clip_on=False)
        panel.set_xscale("symlog", linthresh=LINEAR)  # one set is ahead by as much as all others together
        panel.set_xlim(1.1 * min(ends) - 0.2, 1.1 * max(ends) + 0.2)
        panel.set_xticks([x for x in (*range(-LINEAR, LINEAR + 1), 10, 20) if min(ends) - 0.3 < x < max(ends) + 0.3])
        panel.xaxis.set_major_formatter("{x:g}")
        panel.set_yticks(range(len(datasets)), datasets)
        panel.set_title(f"P@{k}: points above the best peer", loc="left", color=INK, fontsize=11)
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(which="both", length=0, colors=MUTED)
    panels[0].invert_yaxis()
    handles = {text: handle for panel in panels for handle, text in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(DRAWN), frameon=False)
    with plt.rc_context({"svg.hashsalt": "accuracy"}):  # the same bytes each time
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    found = read(args.lines)
    costs = "train s | parameters, million | MB | predict ms | decode ms"
    print(f"| data | head | seeds | P@1 / P@3 / P@5 | PSP@1 / 3 / 5 | R@10 | R@100 | {costs} |")
    print("|" + "---|" * 12)
    for (data, head), lines in found.items():
        cells = [mean_cell([line[i] for line in lines], spread=i == 0) for i in range(len(lines[0]))]
        print(f"| {data} | {head} | {len(lines)} | {' | '.join(cells)} |")
    compared = {data for data, head in found if head not in HEADS}
    datasets = list(dict.fromkeys(data for data, head in found if head in DRAWN and data in compared))
    draw(found, datasets, args.out)


if __name__ == "__main__":
    main()
