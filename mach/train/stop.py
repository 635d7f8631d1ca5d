"""Requests to stop gracefully: a signal, or a file that passes it on to processes elsewhere."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any

from mach.errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE_REQUEST_S = 0.25  # signals closer together are one: launchers send them to a process and to its group
LOOK_S = 0.1  # between looks for the file


class Stop:
    """Notice a request to stop while the block runs: SIGTERM, Ctrl-C, or that `file` exists.

    The first signal is noted, and makes the file, so that whoever else watches it stops, too; the second raises Stopped at once.
    Handlers are set in the main thread only, not for signals that are ignored, and what was set before is put back.
    """

    def __init__(self, file: Path):
        self.file = file
        self.signal: int | None = None  # the first
        self.is_urgent = False  # a second has come
        self._since, self._looked, self._found, self._made = 0.0, 0.0, False, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before is not None and before is not signal.SIG_IGN:
                    self._before[number] = before
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._put_back()
        if self._made:
            self.file.unlink(missing_ok=True)

    @property
    def asked(self) -> bool:
        """Tell whether somebody asked to stop. It looks for the file ten times a second at most."""
        if self.signal is None and not self._found and time.monotonic() - self._looked >= LOOK_S:
            self._found, self._since, self._looked = os.path.exists(self.file), time.monotonic(), time.monotonic()
        return self.signal is not None or self._found

    @property
    def name(self) -> str:
        """Give what asked, as people write it."""
        return "request" if self.signal is None else "Ctrl-C" if self.signal == signal.SIGINT else "SIGTERM"

    @property
    def status(self) -> int:
        """Give the exit status of a graceful stop: 130 after Ctrl-C, 0 otherwise."""
        return 128 + signal.SIGINT if self.signal == signal.SIGINT else 0

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.signal, self._since = number, time.monotonic()
            with suppress(OSError):
                self.file.touch(exist_ok=False)
                self._made = True
        elif time.monotonic() - self._since >= ONE_REQUEST_S:
            self.is_urgent = True
            self._put_back()
            raise Stopped("stopped at once; checkpoints and finished files are kept", 128 + number)

    def _put_back(self) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}


def leave_interrupts_to_the_parent() -> None:
    """Ignore Ctrl-C in a worker: a terminal sends it to every process, and the parent passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
