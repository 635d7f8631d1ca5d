"""A run's history as text for a terminal: where its time went, how fast it was, what was learnt, when it was stopped."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from mach.draw import bar, spark
from mach.inspect.history import History, Line

UNITS = ("B", "kB", "MB", "GB", "TB")


def show(history: History) -> Iterator[str]:
    """Give the lines of text that tell a group's history."""
    state = "finished" if history.is_finished else f"{history.step:,} of {history.n_steps:,} steps"
    if not history.steps:
        yield f"{history.name}: no step yet"
    else:
        speed = f"{history.samples_per_s:,.0f} samples/s, {size_text(history.peak_bytes)} of memory at most"
        yield f"{history.name}: {state}, {history.wall_s:,.1f} s, {speed}"
    for key, title, scale, digits, log in (("loss", "loss", 1, 3, True), ("P@1", "P@1, %", 100, 2, False)):
        values = [scale * value for _, value in history.series(key)]
        if values:
            yield f"  {title:13} {values[0]:7.{digits}f} {spark(values, 50, log=log)} {values[-1]:.{digits}f}"
    yield from show_parts(history.parts_s)
    for line in history.events:
        yield f"  {_event_text(line)}"


def show_parts(parts_s: Mapping[str, float]) -> Iterator[str]:
    """Give a line for each part of training: its share of the time, and its seconds; the longest first."""
    total = sum(parts_s.values())
    for part, seconds in sorted(parts_s.items(), key=lambda item: -item[1]):
        share = seconds / total if total else 0.0
        yield f"  {part:13} {100 * share:5.1f} % {bar(share, 30)} {seconds:,.1f} s"


def show_reranker(record: Mapping[str, Any]) -> str:
    """Say in a line what a run's re-ranker is, from its record."""
    sources = {"dev": "chosen on the dev split", "held out": "chosen on what is held out", "nothing": "as set"}
    near = f" and of {record['near']} near to it" if record.get("near") else ""
    order = record.get("order", f"logit + {record['weight']:g} margin")
    source = sources.get(record.get("chosen_on", ""), "chosen by an earlier version")
    return (
        f"re-ranker of a sample's {record['depth']} best labels{near}: {record['parameters']:,} parameters, "
        f"{size_text(record['bytes'])}, by {order}, {source}, {record['train_s']:.1f} s of fitting"
    )


def size_text(n_bytes: float) -> str:
    """Write a number of bytes for people, in units of 1000."""
    unit = 0
    while round(n_bytes, 1) >= 1000 and unit + 1 < len(UNITS):
        n_bytes, unit = n_bytes / 1000, unit + 1
    return f"{n_bytes:.{1 if unit and n_bytes < 100 else 0}f} {UNITS[unit]}"


def _event_text(line: Line) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(line.get("time", 0)))
    texts = {
        "stopped": f"stopped by {line.get('by')} at step {line['at_step']:,}",
        "resumed": f"resumed at step {line['at_step']:,}"
        + (f", {again:,} logged steps were done again" if (again := line.get("again")) else ""),
        "warning": f"warning at step {line['at_step']:,}: {line.get('text')}",
    }
    return f"{when} {texts.get(line['event'], line['event'])}"
