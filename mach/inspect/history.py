"""How a group's training went, read from its log."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mach.train.log import read_log

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class History:
    """The lines of a log that count: steps done again after a kill count once, as they were the last time."""

    name: str  # group-0-3
    steps: Sequence[Line]
    events: Sequence[Line]  # with `again`, the steps a resumed run had to do again
    is_finished: bool

    def series(self, key: str) -> list[tuple[Line, float]]:
        """Give the lines that hold a finite figure, and the figure: `loss`, `samples_per_s`, `bytes` or `P@1` of validation."""
        found = ((line, line.get(key, line.get("validation", {}).get(key))) for line in self.steps)
        return [(line, value) for line, value in found if value is not None and math.isfinite(value)]

    @property
    def step(self) -> int:
        """Give the last step that is logged, or 0."""
        return self.steps[-1]["step"] if self.steps else 0

    @property
    def n_steps(self) -> int:
        """Give the steps of the whole training, or 0 before the first is logged."""
        return self.steps[-1]["n_steps"] if self.steps else 0

    @property
    def wall_s(self) -> float:
        """Give the seconds of training, without those between a stop and going on."""
        return max((line.get("wall_s", 0.0) for line in self.steps), default=0.0)

    @property
    def samples_per_s(self) -> float:
        """Give the median over the lines, or 0."""
        return statistics.median([value for _, value in self.series("samples_per_s")] or [0.0])

    @property
    def peak_bytes(self) -> int:
        """Give the most memory that was in use, or 0."""
        return max((line.get("peak_bytes", 0) for line in self.steps), default=0)

    @property
    def parts_s(self) -> dict[str, float]:
        """Give the seconds of each part, the longest first."""
        total: dict[str, float] = {}
        for line in self.steps:
            for part, seconds in line.get("parts_s", {}).items():
                total[part] = total.get(part, 0.0) + seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    def to_dict(self) -> dict[str, Any]:
        """Give it as JSON values."""
        figures = {key: [[line["step"], value] for line, value in self.series(key)] for key in ("loss", "P@1")}
        sums = {name: getattr(self, name) for name in ("step", "n_steps", "wall_s", "samples_per_s", "peak_bytes", "parts_s")}
        return {**sums, **figures, "events": list(self.events), "finished": self.is_finished}


def histories(run: Path) -> list[History]:
    """Read the history of each group that has logged into a run folder."""
    return [history_of(file.stem, list(read_log(file))) for file in sorted((run / "logs").glob("*.jsonl"))]


def history_of(name: str, lines: Sequence[Line]) -> History:
    """Sort the lines of a log: what a start or a resumption made void falls away."""
    steps: list[Line] = []
    events: list[Line] = []
    for line in lines:
        event = line.get("event")
        if event in ("begun", "resumed"):
            reached = steps[-1]["step"] if steps else 0
            steps = [step for step in steps if step["step"] <= line["at_step"]]
            events = [] if event == "begun" else [*events, {**line, "again": max(0, reached - line["at_step"])}]
        elif event:
            events.append(line)
        elif "step" in line:
            steps.append(line)
    return History(name, steps, events, is_finished=bool(lines) and "finished" in lines[-1])
