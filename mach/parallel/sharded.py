"""Train one full head by the processes that torchrun or horovodrun started, each with a run of the labels.

All see the run folder. Rank 0 writes the manifest, the log and what all have alike; each writes its labels. What they do together
they do in the same order: whether to stop or to write a checkpoint is put to the vote between two steps.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mach.comm import Comm, part_of
from mach.config import Config
from mach.data import Dataset
from mach.errors import ConfigError, ModelError, RankLost, Stopped
from mach.files import atomic, clear_leftovers, free_bytes
from mach.model import Model, packed_axis, resolve_device
from mach.parallel.comm import connect, launched
from mach.parallel.memory import is_out_of_memory, what_to_lower
from mach.parallel.progress import Watch
from mach.parallel.ready import refuse_full_disk, underway
from mach.parallel.rerank import rerank_if_wanted
from mach.store.folder import Run, sizes_of, table_of
from mach.store.shards import (
    BEST,
    FOLDER,
    UNDERWAY,
    Layout,
    ShardSet,
    delete_set,
    is_sharded,
    part_files,
    read_whole,
    switch,
    write_part,
)  # fmt: skip
from mach.train.checkpoint import checkpoint_path, read_progress
from mach.train.group import HEADER_BYTES, facts_of, go_on, progress_of
from mach.train.log import Log, log_path
from mach.train.sharded import ShardedGroup
from mach.train.stop import NAMES, Stop

VOTE_EVERY = {"cpu": 1, "cuda": 8}  # steps; on a GPU a vote waits for the device
NUMBERS = [0, *sorted(NAMES)]  # of signals; a vote is a place here, 0 for none


def train_sharded(
    config: Config, dataset: Dataset, out: str | Path, *, device: str, resume: bool, checkpoint_s: float, tensorboard: bool,
    progress: bool, stop: str | Path | None, timeout_s: float, comm: Comm | None = None,
) -> Model:  # fmt: skip
    """Train a full head with the other processes into a run folder, and load it on the CPU; see `mach.parallel.train`.

    A run that some number of processes began goes on with any other. Rank 0 fits the re-ranker, if the config has one; the others
    do not wait for it, and load the head as it was trained.

    Args:   comm, the way to the others; without it, that of the environment.
    Raises: ConfigError for hashed tables, which need none of this; RankLost, naming a rank that is gone or stuck, and the
            checkpoint that is left; ModelError; Stopped, once all ranks have ended the same step and written a checkpoint.
    """
    if config.table != "identity":
        raise ConfigError(
            f"table={config.table!r} under {launched().launcher}: hashed repetitions need no communication; start `mach train` "
            "alone, with --workers on one machine, or --repetitions on each of several"
        )
    place = _device(device)
    comm = connect(place, timeout_s=timeout_s) if comm is None else comm
    try:
        with Stop(Path(out) / f".stop.{os.getpid()}.tmp" if stop is None else Path(stop)) as asked:
            left = _Work(config, dataset, Path(out), comm, place, resume).train(asked, checkpoint_s, tensorboard, progress)
    except RankLost as lost:
        raise RankLost(f"{out}: {lost}; {_left_by(Path(out))}") from lost
    except BaseException as error:
        comm.fail(error)
        if not is_out_of_memory(error):
            raise
        lower = what_to_lower(config, sizes_of(config, dataset), place)
        raise ModelError(
            f"{out}: rank {comm.rank} of {comm.size} ran out of memory ({error}); of one process with the whole head, {lower}; "
            "or start more processes, each of which holds fewer labels"
        ) from error
    finally:
        comm.close()
    if left is not None:
        raise left
    run = Run.open(out)
    if comm.rank == 0:
        rerank_if_wanted(run, dataset, device=str(place), progress=progress)
    return run.load([0], device="cpu")


def _device(name: str) -> torch.device:
    """Give this process's device: on a machine with GPUs each process has its own."""
    n_gpus, launch = torch.cuda.device_count(), launched()
    if name == "cpu" or (name == "auto" and not n_gpus) or launch.size == 1:
        return resolve_device(name)
    if name != "auto" or launch.local_rank >= n_gpus:
        raise ConfigError(
            f"device={name!r} for process {launch.local_rank} of this machine, which has {n_gpus} GPUs: it must be 'auto', with "
            "at most as many processes as GPUs, or 'cpu'"
        )
    torch.cuda.set_device(launch.local_rank)
    return torch.device(f"cuda:{launch.local_rank}")


def _left_by(out: Path) -> str:
    """Say what there is to go on from."""
    try:
        run = Run.open(out)
        found = ShardSet.find(out / FOLDER, UNDERWAY, run=run.manifest["key"], n_labels=run.sizes.n_labels)
    except ModelError:
        found = None
    return f"the checkpoint of step {found.step:,} is whole: go on with --resume" if found else "no checkpoint was written yet"


class _Work:
    """One rank's work on one run."""

    def __init__(self, config: Config, dataset: Dataset, out: Path, comm: Comm, device: torch.device, resume: bool):
        self._comm, self._is_first = comm, comm.rank == 0
        if self._is_first:
            clear_leftovers(Run.create(out, config, dataset).path, out / FOLDER)
        comm.barrier()
        self._run = Run.create(out, config, dataset)  # refuses another config or data set than rank 0's
        self._folder, self._key, self._n_labels = self._run.path / FOLDER, self._run.manifest["key"], self._run.sizes.n_labels
        self._is_finished = bool(self._run.finished())
        self._warned = False
        if not self._is_finished:
            self._begin(dataset, device, resume)
        comm.barrier()

    def _begin(self, dataset: Dataset, device: torch.device, resume: bool) -> None:
        run, alone = self._run, checkpoint_path(self._run.path, [0])
        shards = ShardSet.find(self._folder, UNDERWAY, run=self._key, n_labels=self._n_labels)
        if shards and not resume:
            raise ModelError(f"{run.path}: the full head is under way here; add --resume to go on, or choose another --out")
        if not underway(run, [0], resume) and not shards:
            refuse_full_disk(run, [[0]], 1, device, dataset)
        progress: Mapping[str, Any] | None = shards.progress if shards else None
        if alone.exists() and (progress is None or read_progress(alone)["step"] > progress["step"]):
            progress, shards = read_progress(alone), None
        group = self._group = ShardedGroup(
            run.config, dataset, run.sizes, table_of(run.config, run.sizes, [0], dataset.label_names), device, self._comm,
            products=getattr(torch, progress["products"]) if progress else None,
        )  # fmt: skip
        self._labels = part_of(self._n_labels, self._comm.rank, self._comm.size)
        self._spent_s, self._kept_step = 0.0, 0
        if progress:
            if shards:
                shards.read(group.tensors(), self._labels)
            else:
                read_whole(alone, group.tensors(), self._labels)
            self._spent_s, self._kept_step = go_on(group, progress), group.step

    def train(self, stop: Stop, checkpoint_s: float, tensorboard: bool, progress: bool) -> Stopped | None:
        """Train to the finished repetition; give the end to be raised if the ranks were asked to stop before."""
        if self._is_finished:
            return None
        group, log_file = self._group, log_path(self._run.path, [0])
        with ExitStack() as stack:
            self._log: Log | None = None
            if self._is_first:
                stack.enter_context(Watch({"0-0": log_file}, shown=progress))
                events = self._run.path / "tensorboard" / "0-0" if tensorboard else None
                self._log = stack.enter_context(Log(log_file, group, spent_s=self._spent_s, tensorboard=events))
                self._log.write_event("resumed" if group.step else "begun", ranks=self._comm.size)
            tried = self._began = time.monotonic()
            keeps_best = self._run.config.patience > 0
            for record in group.steps(lambda r: self._keep_best() if keeps_best else None):
                if self._log:
                    self._log.write(record)
                if group.done:
                    break
                if group.step % VOTE_EVERY[group.device.type]:
                    continue
                signal, is_due = self._vote(stop, time.monotonic() - tried >= checkpoint_s)
                if signal or is_due:
                    self._checkpoint()
                    tried = time.monotonic()
                if signal:
                    return self._stopped(signal)
            self._finish()
        return None

    @property
    def _seconds(self) -> float:
        return self._spent_s + time.monotonic() - self._began

    def _vote(self, stop: Stop, is_due: bool) -> tuple[int, bool]:
        """Give the signal that some rank got, or 0, and whether rank 0 finds a checkpoint due: the same on all ranks."""
        mine = 0 if not stop.asked else next((n for n in NUMBERS if NAMES.get(n) == stop.name), NUMBERS[-1])
        votes = torch.tensor([NUMBERS.index(mine), is_due and self._is_first], dtype=torch.int64, device=self._group.device)
        found = self._comm.all_reduce(votes, "max").wait().tolist()
        self._group.clock.lap("communication")
        return NUMBERS[found[0]], bool(found[1])

    def _stopped(self, signal: int) -> Stopped:
        group, kept = self._group, self._kept_step
        if self._log:
            self._log.write_event("stopped", by=NAMES[signal], kept_step=kept)
        lost = f", without room to keep the {group.step - kept:,} steps after it" if group.step > kept else ""
        where = f"{self._run.path}: stopped at step {kept:,} of {group.n_steps:,} ({self._comm.size} processes{lost})"
        return Stopped(where, 128 + signal if NAMES[signal] == "Ctrl-C" else 0)

    def _checkpoint(self) -> None:
        """Write a checkpoint, or warn, once, that there is no room for it: then the last one stays."""
        group = self._group
        group.clock.lap("log")
        group.refuse_what_is_not_finite()
        tensors = group.tensors()
        mine = sum(value.nbytes for name, value in tensors.items() if is_sharded(name) or self._is_first) + HEADER_BYTES
        needed = int(self._comm.all_reduce(torch.tensor([mine], device=group.device)).wait())
        free = free_bytes(self._run.path)
        if int(self._comm.all_reduce(torch.tensor([needed > free], dtype=torch.int64, device=group.device), "max").wait()):
            if self._log and not self._warned:
                kept = f"the last one, of step {self._kept_step:,}, stays" if self._kept_step else "there is none yet"
                room = f"no room for a checkpoint of {needed:,} bytes, {free:,} are free here"
                self._log.write_event("warning", text=f"{self._folder}: {room}; {kept}; training goes on; free some space")
            self._warned = True
        else:
            self._write_set(UNDERWAY, tensors, progress_of(self._run, group, self._seconds))
            self._kept_step = group.step
            if self._is_first:
                checkpoint_path(self._run.path, [0]).unlink(missing_ok=True)
        group.clock.lap("checkpoint")

    def _keep_best(self) -> None:
        self._group.clock.lap("validation")
        self._write_set(BEST, self._group.packed.parameters, {})
        self._group.clock.lap("checkpoint")

    def _write_set(self, name: str, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Write a set with the other ranks; on return it is the one that counts."""
        comm, step = self._comm, self._group.step
        own = write_part(
            self._folder, name, step, self._labels, tensors, run=self._key, n_labels=self._n_labels, with_whole=self._is_first
        )
        comm.barrier()
        sizes = torch.tensor([[own.get(file, 0) for file in part_files(name, step, [None, self._labels])]])
        every = comm.all_gather(sizes.to(self._group.device), [1] * comm.size).wait().tolist()
        if self._is_first:
            parts = [part_of(self._n_labels, rank, comm.size) for rank in range(comm.size)]
            bytes_of = [every[0][0], *(size for _, size in every)]
            files = dict(zip(part_files(name, step, [None, *parts]), bytes_of, strict=True))
            switch(self._folder, name, step, parts, files, progress, run=self._key, n_labels=self._n_labels)
        comm.barrier()

    def _finish(self) -> None:
        """Store the head as one repetition: as it ended, or as it was at its best if early stopping kept that."""
        group, comm, weights, seconds = self._group, self._comm, self._run.weights_path(0), self._seconds
        parameters = group.packed.repetition(0)
        best = ShardSet.find(self._folder, BEST, run=self._key, n_labels=self._n_labels)
        if best:
            best.read({name: value.unsqueeze(packed_axis(name)) for name, value in parameters.items()}, self._labels)
        shapes = {name: [self._n_labels if is_sharded(name) else len(x), *x.shape[1:]] for name, x in parameters.items()}
        layout = Layout.of({name: (x.dtype, shapes[name]) for name, x in parameters.items()}, self._run.metadata)
        facts = facts_of(group, 0, seconds)
        peak = comm.all_reduce(torch.tensor([facts["peak_bytes"]], device=group.device), "max").wait()
        try:
            if self._is_first:
                weights.with_suffix(".json").unlink(missing_ok=True)
            with atomic(weights) if self._is_first else nullcontext(weights) as path:
                if self._is_first:
                    layout.create(path)
                with layout.opened(weights.with_name(comm.broadcast(path.name))) as file:
                    for name, value in parameters.items():
                        if is_sharded(name) or self._is_first:
                            file.write(name, value, self._labels.start if is_sharded(name) else 0)
                comm.barrier()
        except OSError as error:
            raise ModelError(f"{weights}: cannot be written ({error}); free some space and go on with --resume") from error
        if self._log:
            n_parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
            self._run.record(0, n_parameters, {**facts, "peak_bytes": int(peak), "ranks": comm.size})
            self._log.write_fields({"finished": [0], "seconds": round(seconds, 3)})
            for name in (UNDERWAY, BEST):
                delete_set(self._folder, name)
            checkpoint_path(self._run.path, [0]).unlink(missing_ok=True)
        comm.barrier()
