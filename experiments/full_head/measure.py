"""What the scripts of this folder measure with: times taken in turn, memory counted by torch's allocator and by the system."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mach.compare.rows import this_machine

MIB = 1 << 20


def in_turn(calls: Mapping[str, Callable[[], object]], n_rounds: int) -> dict[str, list[float]]:
    """Time each call once a round, in turn, after a round that is not counted, so that what slows the machine slows them all."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(n_rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Give the median of the ratios of each round, and its range."""
    each = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"{statistics.median(each):.2f} ({min(each):.2f}..{max(each):.2f})"


def resident_growth(call: Callable[[], object]) -> int:
    """Give how far the process's resident memory rises above where it stood, at its highest, while the call runs.

    All that is touched counts, of every library, in whole pages.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, or it would be had again without a trace
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text().partition(f"{key}:")[2]
    return int(text.split()[0]) * 1024


def allocated_peak(call: Callable[[], object]) -> int:
    """Give the most bytes of tensors that are alive at once of those that the call makes: every allocation is counted.

    What libraries take behind torch's back, such as the packed panels of a matrix product, is not in it.
    """
    gc.collect()
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events: list[Any] = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def machine() -> str:
    """Name the machine in a line."""
    return ", ".join(f"{name} {value}" for name, value in this_machine().items()) + f", {torch.get_num_threads()} torch threads"
