"""Train one group of repetitions into a run folder: the loop's shell, with its log, its checkpoints and its end.

Killed at any moment, it loses at most the work since its last checkpoint; resumed, it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from mach.data import Dataset
from mach.errors import MissingExtra, ModelError
from mach.model import resolve_device
from mach.store.folder import Run, format_repetitions, table_of
from mach.train.checkpoint import best_path, checkpoint_path, read_progress, read_tensors, write_checkpoint
from mach.train.loop import Group, Standing, StepRecord, peak_bytes

LOG_SECONDS = 0.5  # between log lines that hold neither a validation nor the end


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One group's work, in plain values that travel to any worker."""

    run: Path
    data: Path
    repetitions: tuple[int, ...]
    device: str
    threads: int  # of the CPU; 0: leave as they are
    checkpoint_s: float  # seconds between checkpoints
    checkpoint_first: bool  # before the first step, so that a group is known as one from its start
    tensorboard: bool = False


def log_path(run: Path, repetitions: Sequence[int]) -> Path:
    """Give where a group logs: a JSON object a line."""
    return run / "logs" / f"group-{format_repetitions(repetitions)}.jsonl"


def train_group(job: Job) -> None:
    """Train a group from its checkpoint, or from the start, to its finished repetitions in the run folder.

    Raises: ModelError if the disk refuses or a checkpoint is broken.
    """
    if job.threads:
        torch.set_num_threads(job.threads)
    run, dataset = Run.open(job.run), Dataset.open(job.data)
    table = table_of(run.config, run.sizes, job.repetitions, dataset.label_names)
    path = checkpoint_path(job.run, job.repetitions)
    begun_in = getattr(torch, read_progress(path)["products"]) if path.exists() else None  # a run goes on as it began
    group = Group(run.config, dataset, run.sizes, table, resolve_device(job.device), products=begun_in)
    spent_s = _restore(group, path) if path.exists() else 0.0
    if job.checkpoint_first and not path.exists():
        write_checkpoint(path, group.tensors(), _progress(run, group, spent_s))
    began = time.perf_counter()
    best = [best_path(job.run, r) for r in job.repetitions]
    saved = time.monotonic()
    with _Log(job) as log:
        keep = run.config.patience > 0
        for record in group.steps(lambda r: _keep_best(group, r, best[r]) if keep else None):
            log.write(record)
            if time.monotonic() - saved >= job.checkpoint_s and not group.done:
                progress = _progress(run, group, spent_s + time.perf_counter() - began)
                write_checkpoint(path, group.tensors(), progress)
                saved = time.monotonic()
        seconds = spent_s + time.perf_counter() - began
        if len(group.repetitions) > 1:  # stopped while storing them, all end as one group still
            write_checkpoint(path, group.tensors(), _progress(run, group, seconds))
        _finish(run, group, best, seconds)
        log.write_fields({"finished": list(job.repetitions), "seconds": round(seconds, 3)})
    for file in [path, *best]:
        file.unlink(missing_ok=True)


def _finish(run: Run, group: Group, best: Sequence[Path], seconds: float) -> None:
    """Store each repetition: as it ended, or as it was at its best if early stopping kept that."""
    finished = run.finished()  # some may be, if the group was stopped between two of them
    for r, number in enumerate(group.repetitions):
        if number in finished:
            continue
        parameters = group.packed.repetition(r)
        if best[r].exists():
            read_tensors(best[r], parameters)
        facts = {
            "steps": group.step,
            "train_s": round(seconds / len(group.repetitions), 3),  # its share of the group's time
            "peak_bytes": peak_bytes(group.device),
            "group": list(group.repetitions),
            "products": str(group.products).removeprefix("torch."),
            "bucket_P@1": group.standings[r].best if group.held_out is not None else None,
        }
        run.add(number, parameters, facts)


def _keep_best(group: Group, r: int, path: Path) -> None:
    write_checkpoint(path, group.packed.repetition(r), {"step": group.step})


def _progress(run: Run, group: Group, seconds: float) -> dict[str, Any]:
    return {
        "run": run.manifest["key"],
        "repetitions": list(group.repetitions),
        "products": str(group.products).removeprefix("torch."),
        "step": group.step,
        "seconds": seconds,
        "standings": [dataclasses.asdict(s) for s in group.standings],
    }


def _restore(group: Group, path: Path) -> float:
    """Bring a new group to where its checkpoint stands; give the seconds already spent."""
    progress = read_progress(path)
    read_tensors(path, group.tensors())
    group.step = group.optimizer.step = int(progress["step"])
    group.standings = [Standing(**standing) for standing in progress["standings"]]
    return float(progress["seconds"])


class _Log:
    """The group's JSONL log and, if asked for, its TensorBoard events."""

    def __init__(self, job: Job):
        self._path = log_path(job.run, job.repetitions)
        self._tensorboard = (
            _tensorboard(job.run / "tensorboard" / format_repetitions(job.repetitions)) if job.tensorboard else None
        )
        self._last, self._samples = 0.0, []  # type: float, list[float]
        self._file: IO[str] | None = None

    def __enter__(self) -> _Log:
        try:
            self._path.parent.mkdir(exist_ok=True)
            self._file = open(self._path, "a", encoding="utf-8")
        except OSError as error:
            raise ModelError(f"{self._path}: the log cannot be written ({error.strerror})") from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()

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
        self._last, self._samples = now, []
        self.write_fields(fields)

    def write_fields(self, fields: dict[str, Any]) -> None:
        """Write one line and hand it to the system at once."""
        assert self._file is not None
        try:
            self._file.write(json.dumps(fields) + "\n")
            self._file.flush()
        except OSError as error:
            raise ModelError(f"{self._path}: the log cannot be written ({error.strerror}); go on with --resume") from error


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
