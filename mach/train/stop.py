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

NAMES: dict[int, str] = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
ONE_REQUEST_S = 0.25  # signals closer together are one: launchers send them to a process and to its group
LOOK_S = 0.1  # between looks for the file


class Stop:
    """Notice a request to stop while the block runs: SIGTERM, Ctrl-C, or that `file` exists.

    The first signal is noted, and makes the file, which names it, so that whoever else watches it stops, too; the second raises
    Stopped at once.
    Handlers are set in the main thread only, not for signals that are ignored, and what was set before is put back.
    """

    def __init__(self, file: Path):
        self.file = file
        self.name = ""  # of what asked, as people write it
        self.is_urgent = False  # a second signal has come
        self._since, self._looked, self._made = 0.0, 0.0, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            for number in NAMES:
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
        if not self.name and time.monotonic() - self._looked >= LOOK_S:
            self._since = self._looked = time.monotonic()
            with suppress(OSError, ValueError):
                self.name = self.file.read_text(encoding="utf-8")[:80].strip() or "request"
        return bool(self.name)

    @property
    def status(self) -> int:
        """Give the exit status of a graceful stop: 130 after Ctrl-C, 0 otherwise."""
        return 128 + signal.SIGINT if self.name == NAMES[signal.SIGINT] else 0

    def _note(self, number: int, _: FrameType | None) -> None:
        if not self.asked:
            self.name, self._since = NAMES[number], time.monotonic()
            with suppress(OSError):
                if not self.file.exists():
                    new = self.file.with_name(f"{self.file.name}-{os.getpid()}")
                    new.write_text(self.name, encoding="utf-8")
                    self._made = True
                    new.replace(self.file)  # whole, or not there: an empty one would be a request without a name
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
