"""A group's log: a JSON object a line, in files of bounded size, and TensorBoard events if asked for.

A line of training holds what the step did; since the line before, `samples_per_s` and `parts_s`, the seconds by part; `bytes` and
`peak_bytes` of memory; `wall_s`, the seconds of training since the group's start, those before a stop included. Between stand
events, such as {"event": "stopped", "at_step": 12, ...}, and at the end {"finished": [repetitions], "seconds": ...}.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from mach.errors import MissingExtra, ModelError
from mach.store.folder import format_repetitions
from mach.train.loop import Group, StepRecord
from mach.train.memory import peak_bytes, used_bytes

LOG_SECONDS = 0.5  # between log lines that hold neither a validation nor the end
LOG_BYTES = 16 << 20  # of one file; a full one becomes log.1, and that log.2, ...
LOG_FILES = 3  # full ones that are kept


def log_path(run: Path, repetitions: Sequence[int]) -> Path:
    """Give where a group logs: a JSON object a line. Older lines may lie beside it, in log.1, log.2, ... (`read_log`)."""
    return run / "logs" / f"group-{format_repetitions(repetitions)}.jsonl"


def read_log(path: Path) -> Iterator[dict[str, Any]]:
    """Read a log and what was rotated away from it, oldest line first. A line cut short, where the disk was full, is left out."""
    for file in [*(_rotated(path, i) for i in range(LOG_FILES, 0, -1)), path]:
        if not file.exists():
            continue
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                fields = json.loads(line)
            except ValueError:
                continue
            if isinstance(fields, dict):
                yield fields


def _rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def append_warning(path: Path, text: str, *, at_step: int) -> None:
    """Add a warning to a log that no group is writing."""
    path.parent.mkdir(exist_ok=True)  # a group may end before its first line
    fields = {"event": "warning", "at_step": at_step, "text": text, "time": round(time.time(), 1)}
    with open(path, "ab") as file:
        file.write(json.dumps(fields).encode() + b"\n")


class Log:
    """Write a group's log while the block runs.

    Raises: ModelError if the disk refuses.
    """

    def __init__(self, path: Path, group: Group, *, spent_s: float, tensorboard: Path | None):
        self._path, self._group, self._spent_s = path, group, spent_s
        self._began = time.perf_counter()
        self._tensorboard = None if tensorboard is None else _tensorboard(tensorboard)
        self._last, self._samples = 0.0, []  # type: float, list[float]
        self._file: IO[bytes] | None = None

    def __enter__(self) -> Log:
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = open(self._path, "ab+")
            if self._file.tell() and os.pread(self._file.fileno(), 1, self._file.tell() - 1) != b"\n":
                self._file.write(b"\n")  # a run was killed within a line
        except OSError as error:
            raise ModelError(f"{self._path}: the log cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

    @property
    def seconds(self) -> float:
        """Give the seconds of training since the group's start, without those between a stop and going on."""
        return self._spent_s + time.perf_counter() - self._began

    def write(self, record: StepRecord) -> None:
        """Note a step, now and then: every half second, and whenever it holds a validation or is the last."""
        self._samples.append(1 / record.samples_per_s)
        if self._tensorboard is not None:
            for name, value in _figures(record):
                self._tensorboard.add_scalar(name, value, record.step)
        now = time.monotonic()
        if now - self._last < LOG_SECONDS and record.validation is None and record.loss is None and record.step < record.n_steps:
            return
        fields = {k: v for k, v in dataclasses.asdict(record).items() if v is not None}
        fields["samples_per_s"] = round(len(self._samples) / sum(self._samples), 1)
        fields["parts_s"] = {part: round(seconds, 6) for part, seconds in self._group.clock.read().items()}
        fields["bytes"], fields["peak_bytes"] = used_bytes(self._group.device), peak_bytes(self._group.device)
        self._last, self._samples = now, []
        self.write_fields({**fields, "wall_s": round(self.seconds, 3)})

    def write_event(self, event: str, **fields: Any) -> None:
        """Note something that happened at the step where the group stands."""
        now = {"wall_s": round(self.seconds, 3), "time": round(time.time(), 1)}  # seconds since 1970: pauses can be seen
        self.write_fields({"event": event, "at_step": self._group.step, **fields, **now})

    def write_fields(self, fields: dict[str, Any]) -> None:
        """Write one line and hand it to the system at once."""
        assert self._file is not None
        line = json.dumps(fields).encode() + b"\n"
        try:
            if self._file.tell() and self._file.tell() + len(line) > LOG_BYTES:
                self._rotate()
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise ModelError(f"{self._path}: the log cannot be written ({error.strerror}); go on with --resume") from error

    def _rotate(self) -> None:
        """Begin a new file; the oldest falls away."""
        assert self._file is not None
        self._file.close()
        for number in range(LOG_FILES, 0, -1):
            older = _rotated(self._path, number - 1) if number > 1 else self._path
            if older.exists():
                os.replace(older, _rotated(self._path, number))
        self._file = open(self._path, "ab+")


def _figures(record: StepRecord) -> Iterator[tuple[str, float]]:
    if record.loss is not None:
        yield "loss", record.loss
    yield "samples_per_s", record.samples_per_s
    yield "rate", record.rate
    for name, value in (record.validation or {}).items():
        yield f"validation/{name}", value


def _tensorboard(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtra("writing TensorBoard events", "tensorboard") from error
    return SummaryWriter(str(folder))
