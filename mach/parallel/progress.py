"""Progress bars of groups that train here or in other processes: read from their logs, so one way serves all."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, Any

EVERY_S = 0.25


class Watch:
    """Show a bar for each group of repetitions r while the block runs: steps, time left, samples/s, loss, validation P@1.

    What a group warns of stands above the bars.
    """

    def __init__(self, logs: Mapping[str, Path], *, shown: bool):
        self._logs, self._shown = logs, shown
        self._stop = threading.Event()

    def __enter__(self) -> Watch:
        if self._shown and self._logs:
            self._offsets = {name: path.stat().st_size if path.exists() else 0 for name, path in self._logs.items()}
            self._files: dict[str, IO[bytes]] = {name: open(path, "rb") for name, path in self._logs.items() if path.exists()}
            self._bars = _bars()
            self._tasks: dict[str, Any] = {}
            self._bars.start()
            self._thread = threading.Thread(target=self._follow, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._shown and self._logs:
            self._stop.set()
            self._thread.join()
            self._bars.stop()
            for file in self._files.values():
                file.close()

    def _follow(self) -> None:
        while not self._stop.wait(EVERY_S):
            self._show_new()
        self._show_new()

    def _show_new(self) -> None:
        for name, path in self._logs.items():
            with suppress(FileNotFoundError):  # not begun, or between two files of a rotation: next time
                self._read(name, path)

    def _read(self, name: str, path: Path) -> None:
        """Show what is new in a log, and what is in the file that has taken its place."""
        if name not in self._files:
            self._files[name] = open(path, "rb")
        file = self._files[name]
        is_full = os.stat(path).st_ino != os.fstat(file.fileno()).st_ino
        file.seek(self._offsets[name])
        text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._offsets[name] += len(whole)
        for line in filter(None, whole.splitlines()):
            self._update(name, json.loads(line))
        if is_full:
            self._files.pop(name).close()
            self._offsets[name] = 0
            self._read(name, path)

    def _update(self, name: str, fields: Mapping[str, Any]) -> None:
        if fields.get("event") == "warning":
            self._bars.console.print(f"r {name}: warning: {fields['text']}", markup=False, highlight=False, soft_wrap=True)
        if "step" not in fields:
            return
        if name not in self._tasks:
            self._tasks[name] = self._bars.add_task(f"r {name}", total=fields["n_steps"], speed="", loss="", quality="")
        shown = {"speed": f"{fields['samples_per_s']:,.0f} samples/s"}
        if "loss" in fields:
            shown["loss"] = f"loss {fields['loss']:.3f}"
        if "validation" in fields:
            shown["quality"] = f"P@1 {100 * fields['validation']['P@1']:.2f}"
        self._bars.update(self._tasks[name], completed=fields["step"], **shown)


def _bars() -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    texts = [TextColumn("{task.fields[" + name + "]}") for name in ("speed", "loss", "quality")]
    return Progress(
        TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeRemainingColumn(), *texts,
        console=Console(stderr=True),
    )  # fmt: skip  # 80 columns hold it all
