"""A calibration as text for a terminal and as a reliability diagram: are labels right as often as is said."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mach.calibration import Calibration, Threshold
from mach.draw import INK, LINE, MUTED, PALETTE, bar
from mach.inspect.plot import check_ending, save
from mach.store.calibration import METHOD

MEASURES = {"ECE": "expected calibration error", "Brier": "Brier score"}


def show_calibration(calibration: Calibration) -> Iterator[str]:
    """Give the lines of text that tell what a calibration is worth."""
    of, before, after = calibration.of, calibration.measured["before"], calibration.measured["after"]
    yield f"{of['n_samples']:,} samples of {of['split']}, the {of['k']:,} best labels of each; halves judged by each other's map"
    yield f"{'probability':28}{'right':>5}{'labels':>34}"
    for n, probability, right in after["bins"]:
        yield f"{probability:5.3f} {bar(probability)}  {right:5.3f} {bar(right)}{n:>13,}"
    yield f"{'over the best labels of each':40}{'before':>8}{'after':>8}"
    for measure, title in MEASURES.items():
        for name in [name for name in after if name.startswith(measure)]:
            yield f"  {f'{title}, {name}':38}{before[name]:>8.4f}{after[name]:>8.4f}"
    yield f"{'precision':>9}{'scores from':>13}{'recall':>8}{'coverage':>10}{'on the other half':>19}"
    for threshold in calibration.thresholds:
        yield _threshold_line(threshold)


def summary(calibration: Calibration) -> str:
    """Say in a line what a calibration was fitted on, and how far it can be trusted."""
    of, scores, after = calibration.of, calibration.of["scores"], calibration.measured["after"]
    stages = f"{scores['estimator']} of repetitions {scores['repetitions']}{' and the re-ranker' if 'reranker' in scores else ''}"
    errors = ", ".join(f"{name} {after[name]:.4f}" for name in after if name.startswith("ECE"))
    return f"calibration: {METHOD}, fitted on {of['n_samples']:,} samples of {of['split']}, {stages}; {errors}"


def _threshold_line(threshold: Threshold) -> str:
    if threshold.score is None:
        return f"{threshold.wanted:>9g}  no score reaches it here"
    held_out = "" if threshold.held_out is None else f"{threshold.held_out:>19.3f}"
    return f"{threshold.wanted:>9g}{threshold.score:>13.5g}{threshold.recall:>8.3f}{threshold.coverage:>10.3f}{held_out}"


def plot_calibration(calibration: Calibration, path: str | Path) -> None:
    """Draw the reliability diagram, before and after, and how many labels there are of each probability, into a file.

    Raises: ConfigError for another ending than .png, .svg or .pdf; ModelError if the disk refuses.
    """
    check_ending(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.5, 7.5), layout="constrained")
    diagram, counts = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    draw_bins(diagram, {name: calibration.measured[name]["bins"] for name in ("before", "after")})
    diagram.set_title("Share that is right, by probability", loc="left", color=INK, fontsize=12, fontweight="bold")
    n, probability, _ = zip(*calibration.measured["after"]["bins"], strict=True)
    counts.bar(probability, n, width=0.05, color=PALETTE[0])
    counts.set_yscale("log")
    counts.set_title("Labels", loc="left", color=INK, fontsize=12, fontweight="bold")
    counts.set_xlabel("probability", color=MUTED, fontsize=11)
    for panel in (diagram, counts):
        panel.spines[:].set_visible(False)
        panel.tick_params(which="both", length=0, labelcolor=MUTED, labelsize=10)
        panel.grid(axis="y", color=LINE, linewidth=0.8)
        panel.set_axisbelow(True)
    save(figure, path)


def draw_bins(panel: Any, bins: dict[str, list[list[float]]]) -> None:
    """Draw bins (n, probability, share right) as lines, a name each, beside the diagonal on which they should lie."""
    panel.plot([0, 1], [0, 1], color=MUTED, linewidth=1, linestyle=(0, (5, 3)))
    for i, (name, each) in enumerate(reversed(bins.items())):
        _, probability, right = zip(*each, strict=True)
        panel.plot(probability, right, color=PALETTE[i], linewidth=1.6, marker="o", markersize=4, label=name)
    panel.set_xlim(0, 1)
    panel.set_ylim(0, 1)
    panel.legend(frameon=False, fontsize=10, labelcolor=MUTED)
