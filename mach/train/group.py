"""Train one group of repetitions into a run folder: the loop's shell, with its log, its checkpoints and its end.

Killed at any moment, it loses at most the work since its last checkpoint; resumed, it ends with the same bits.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mach.data import Dataset
from mach.files import free_bytes
from mach.model import resolve_device
from mach.store.folder import Run, format_repetitions, table_of
from mach.train.checkpoint import best_path, checkpoint_path, read_progress, read_tensors, write_checkpoint
from mach.train.grouped import with_groups
from mach.train.log import Log, log_path
from mach.train.loop import Group, Standing
from mach.train.memory import peak_bytes
from mach.train.stop import Stop

HEADER_BYTES = 1 << 16  # of a checkpoint, at most: names, shapes and progress


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
    stop: Path  # a file whose appearance asks to stop
    tensorboard: bool = False


@dataclass(frozen=True, slots=True)
class Left:
    """How far a group is whose training was stopped."""

    repetitions: tuple[int, ...]
    step: int  # from which it can go on; 0: not begun
    n_steps: int
    lost: int = 0  # steps after it that no checkpoint holds


def train_group(job: Job, stop: Stop | None = None) -> Left | None:
    """Train a group from its checkpoint, or from the start, to its finished repetitions in the run folder.

    Asked to stop, it ends the step under way, writes its checkpoint and says how far it is. Without `stop`, it listens itself.

    Raises: ModelError if the disk refuses or a checkpoint is broken; Stopped at a second signal.
    """
    if stop is None:
        with Stop(job.stop) as stop:
            return train_group(job, stop)
    if not stop.asked:
        return _train_group(job, stop)
    path = checkpoint_path(job.run, job.repetitions)
    progress = read_progress(path) if path.exists() else {"step": 0}
    return Left(job.repetitions, progress["step"], progress.get("n_steps", 0))


def _train_group(job: Job, stop: Stop) -> Left | None:
    if job.threads:
        torch.set_num_threads(job.threads)
    run, dataset = Run.open(job.run), Dataset.open(job.data)
    table = with_groups(table_of(run.config, run.sizes, job.repetitions, dataset.label_names), run.config, run.sizes, dataset)
    path = checkpoint_path(job.run, job.repetitions)
    begun_in = getattr(torch, read_progress(path)["products"]) if path.exists() else None  # a run goes on as it began
    group = Group(run.config, dataset, run.sizes, table, resolve_device(job.device), products=begun_in)
    spent_s = _restore(group, path) if path.exists() else 0.0
    best = [best_path(job.run, r) for r in job.repetitions]
    events = job.run / "tensorboard" / format_repetitions(job.repetitions) if job.tensorboard else None
    with Log(log_path(job.run, job.repetitions), group, spent_s=spent_s, tensorboard=events) as log:
        log.write_event("resumed" if group.step else "begun")
        keeper = _Keeper(path, run, group, log)
        if job.checkpoint_first and not path.exists():
            keeper.write()
        keeps_best = run.config.patience > 0
        for record in group.steps(lambda r: _keep_best(group, r, best[r]) if keeps_best else None):
            log.write(record)
            if group.done:
                break
            is_asked = stop.asked  # once: it may change at any moment
            if is_asked or time.monotonic() - keeper.tried >= job.checkpoint_s:
                keeper.write()
            if is_asked:
                log.write_event("stopped", by=stop.name, kept_step=keeper.step)
                return Left(group.repetitions, keeper.step, group.n_steps, group.step - keeper.step)
        if len(group.repetitions) > 1:  # stopped while storing them, all end as one group still
            keeper.write()
        _finish(run, group, best, log.seconds)
        log.write_fields({"finished": list(job.repetitions), "seconds": round(log.seconds, 3)})
    for file in [path, *best]:
        file.unlink(missing_ok=True)
    return None


class _Keeper:
    """Write a group's checkpoints, as long as there is room for the next beside the last; nothing that is not finite."""

    def __init__(self, path: Path, run: Run, group: Group, log: Log):
        self._path, self._run, self._group, self._log = path, run, group, log
        self.step = group.step  # of the last checkpoint
        self.tried = time.monotonic()
        self._warned = False

    def write(self) -> None:
        """Write one, or warn, once, that there is no room: then the last one stays.

        Raises: ModelError if the disk refuses all the same, or a weight is not finite.
        """
        group, tensors = self._group, self._group.tensors()
        group.clock.lap("log")
        group.refuse_what_is_not_finite()
        needed, free = sum(value.nbytes for value in tensors.values()) + HEADER_BYTES, free_bytes(self._run.path)
        if needed <= free:
            write_checkpoint(self._path, tensors, progress_of(self._run, group, self._log.seconds))
            self.step = group.step
        elif not self._warned:
            self._warned = True
            kept = f"the last one, of step {self.step:,}, stays" if self._path.exists() else "there is none yet"
            self._log.write_event(
                "warning",
                text=f"{self._path.parent}: no room for a checkpoint of {needed:,} bytes, {free:,} are free; {kept}; training "
                "goes on; free some space",
            )
        group.clock.lap("checkpoint")
        self.tried = time.monotonic()


def _finish(run: Run, group: Group, best: Sequence[Path], seconds: float) -> None:
    """Store each repetition: as it ended, or as it was at its best if early stopping kept that."""
    finished = run.finished()  # some may be, if the group was stopped between two of them
    for r, number in enumerate(group.repetitions):
        if number in finished:
            continue
        parameters = group.packed.repetition(r)
        if best[r].exists():
            read_tensors(best[r], parameters)
        run.add(number, parameters, facts_of(group, r, seconds), table_K=group.table.given.get(number))


def facts_of(group: Group, r: int, seconds: float) -> dict[str, Any]:
    """Give what the record of the r-th packed repetition says of its training."""
    return {
        "steps": group.step,
        "parts_s": {part: round(s / len(group.repetitions), 6) for part, s in group.clock.spent().items()},  # its share, too
        "train_s": round(seconds / len(group.repetitions), 3),  # its share of the group's time
        "peak_bytes": peak_bytes(group.device),
        "group": list(group.repetitions),
        "products": str(group.products).removeprefix("torch."),
        "is_grouped": group.repetitions[r] in group.table.given,
        "bucket_P@1": group.standings[r].best if group.held_out is not None else None,
    }


def _keep_best(group: Group, r: int, path: Path) -> None:
    group.clock.lap("validation")
    write_checkpoint(path, group.packed.repetition(r), {"step": group.step})
    group.clock.lap("checkpoint")


def progress_of(run: Run, group: Group, seconds: float) -> dict[str, Any]:
    """Give how far a group is, in plain values."""
    return {
        "run": run.manifest["key"],
        "repetitions": list(group.repetitions),
        "products": str(group.products).removeprefix("torch."),
        "step": group.step,
        "n_steps": group.n_steps,
        "seconds": seconds,
        "standings": [dataclasses.asdict(s) for s in group.standings],
        "parts_s": group.clock.spent(),
    }


def _restore(group: Group, path: Path) -> float:
    """Bring a new group to where its checkpoint stands; give the seconds already spent."""
    read_tensors(path, group.tensors())
    return go_on(group, read_progress(path))


def go_on(group: Group, progress: Mapping[str, Any]) -> float:
    """Set a group, whose tensors are read, to where `progress_of` says; give the seconds already spent."""
    group.step = group.optimizer.step = int(progress["step"])
    group.standings = [Standing(**standing) for standing in progress["standings"]]
    group.clock.go_on_from(progress.get("parts_s", {}))  # a checkpoint of an earlier version tells none
    return float(progress["seconds"])
