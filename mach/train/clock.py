"""Where the time of training goes: seconds by part, cheap enough to be always on."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import torch

cuda: Any = torch.cuda  # whose events have no types


class Clock:
    """Seconds by part: `lap(part)` gives to a part what has passed since the lap before.

    It reads the host's time, in less than a microsecond a lap: right for the CPU, where work is done when a call returns.
    """

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._earlier: dict[str, float] = {}  # of all readings, and of what came before a stop
        self._last = time.perf_counter()

    def start(self) -> None:
        """Begin here: what passed since the last lap belongs to no part."""
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Give a part what has passed since the lap before, or the start."""
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Give the seconds of each part since the last reading, and begin to count anew."""
        self._earlier, seconds, self._seconds = self.spent(), self._seconds, {}
        return seconds

    def spent(self) -> dict[str, float]:
        """Give the seconds of each part since the beginning, whatever was read between."""
        parts = {**self._earlier, **self._seconds}
        return {part: self._earlier.get(part, 0.0) + self._seconds.get(part, 0.0) for part in parts}

    def go_on_from(self, spent: Mapping[str, float]) -> None:
        """Count what was spent before this clock began as `spent`."""
        self._earlier = dict(spent)


class DeviceClock(Clock):
    """The same on a GPU's own time line: a lap puts an event into the stream and returns; nothing waits for the device.

    A part holds the time from the event before to its own, idle time included: waiting for a batch counts as "data", as
    the work after it is put into the stream no sooner. A reading counts what the device has passed; the rest is in the next.
    """

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self._ahead: deque[tuple[str, Any]] = deque()  # not passed yet, as far as known
        self._spare: list[Any] = []
        self._passed = self._event()

    def start(self) -> None:
        """Begin here: what passed since the last lap belongs to no part."""
        self._pass()
        self._ahead.clear()
        self._passed = self._event()

    def lap(self, part: str) -> None:
        """Give a part what will have passed on the device since the lap before, or the start."""
        self._ahead.append((part, self._event()))
        if len(self._ahead) % 1024 == 0:
            self._pass()

    def read(self) -> dict[str, float]:
        """Give the seconds of each part since the last reading, as far as the device has come, and begin to count anew."""
        self._pass()
        return super().read()

    def spent(self) -> dict[str, float]:
        """Give the seconds of each part since the beginning, as far as the device has come."""
        self._pass()
        return super().spent()

    def _event(self) -> Any:
        event = self._spare.pop() if self._spare else cuda.Event(enable_timing=True)
        event.record(cuda.current_stream(self._device))
        return event

    def _pass(self) -> None:
        """Count the laps that the device has passed; their events serve again."""
        while self._ahead and self._ahead[0][1].query():
            part, event = self._ahead.popleft()
            self._seconds[part] = self._seconds.get(part, 0.0) + self._passed.elapsed_time(event) / 1000
            self._spare.append(self._passed)
            self._passed = event


def clock_for(device: torch.device) -> Clock:
    """Give the clock that is right for a device."""
    return DeviceClock(device) if device.type == "cuda" else Clock()
