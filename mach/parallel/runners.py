"""Train an ensemble: plan its groups and let joblib run them over the devices there are."""

from __future__ import annotations

import gc
import os
import tempfile
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mach.config import Config
from mach.data import Dataset
from mach.errors import ConfigError, ModelError, Stopped
from mach.files import clear_leftovers
from mach.model import Model, Sizes
from mach.parallel.comm import TIMEOUT_S, launched
from mach.parallel.devices import devices_of
from mach.parallel.memory import free_memory, group_size, is_out_of_memory, what_to_lower
from mach.parallel.plan import plan_groups
from mach.parallel.progress import Watch
from mach.parallel.ready import refuse_full_disk, underway
from mach.parallel.rerank import rerank_if_wanted
from mach.store.folder import Run, format_repetitions, sizes_of
from mach.store.shards import is_cut
from mach.train.checkpoint import FOLDER, checkpoint_path, read_progress, split_checkpoint
from mach.train.group import Job, Left, train_group
from mach.train.log import append_warning, log_path
from mach.train.stop import Stop, leave_interrupts_to_the_parent

CHECKPOINT_S = 120.0


def train(
    config: Config,
    dataset: Dataset,
    out: str | Path | None = None,
    *,
    repetitions: Sequence[int] | None = None,
    device: str = "auto",
    workers: int | None = None,
    resume: bool = False,
    checkpoint_s: float = CHECKPOINT_S,
    tensorboard: bool = False,
    progress: bool = False,
    stop: str | Path | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Model:
    """Train an ensemble, or some of its repetitions, into a run folder, and load it.

    Repetitions that are finished there stay as they are, so an ensemble grows, and a lost repetition is trained alone.
    Once all are there, the re-ranker is fitted if the config has one (`mach.parallel.rerank`).
    Processes that torchrun or horovodrun started train one full head together, each its run of the labels.

    Args:    out, the run folder; without it, a temporary one that lives as long as the model.
             repetitions, their numbers; without them 0..R-1 of the config.
             device, `auto` (every GPU, or the CPU), `cpu` or `cuda:i`; workers, processes (default: one a GPU, or one).
             resume, go on from the checkpoints of a run that was stopped: same bits as if it never had been.
             checkpoint_s, seconds between checkpoints; progress, bars on the terminal.
             stop, a file: once it exists, training stops as after a signal.
             timeout_s, seconds that processes which train a head together wait for each other in a step.
    Raises:  ConfigError, DataError or ModelError: what came, what is allowed, what to do.
             Stopped, a KeyboardInterrupt, after SIGTERM or Ctrl-C: each group has ended its step and written its checkpoint, and
             resume=True goes on. A second signal stops at once.
    """
    wanted = _wanted(config, sizes_of(config, dataset), repetitions)
    if launched().size > 1 or (out is not None and config.table == "identity" and is_cut(Path(out))):
        from mach.parallel.sharded import train_sharded  # here, as it goes through this file's checks

        if out is None or (launched().size > 1 and workers is not None):
            given = "no run folder" if out is None else f"workers={workers}"
            raise ConfigError(f"{given}: processes that {launched().launcher} started need an out that all see, and no workers")
        return train_sharded(
            config, dataset, out, device=device, resume=resume, checkpoint_s=checkpoint_s, tensorboard=tensorboard,
            progress=progress, stop=stop, timeout_s=timeout_s,
        )  # fmt: skip
    folder, temporary = (Path(out), None) if out is not None else _temporary()
    devices = devices_of(device)
    n_workers = len(devices) if workers is None else workers
    if n_workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    run = Run.create(folder, config, dataset)
    clear_leftovers(run.path, run.path / FOLDER)
    begun = underway(run, wanted, resume)
    groups = plan_groups(
        wanted,
        finished=run.finished(),
        underway=begun,
        n_workers=n_workers,
        group_size=_group_size(run, devices, n_workers),
    )
    refuse_full_disk(run, groups, n_workers, torch.device(devices[0]), dataset)
    asked = Stop(run.path / f".stop.{os.getpid()}.tmp" if stop is None else Path(stop))
    if stop is None:
        asked.file.unlink(missing_ok=True)  # of a killed process that had our number: in a container all are small
    jobs = [
        Job(
            run=run.path.resolve(),
            data=dataset.path.resolve(),
            repetitions=group,
            device=devices[i % len(devices)],
            threads=max(1, (os.cpu_count() or 1) // n_workers) if n_workers > 1 else 0,
            checkpoint_s=checkpoint_s,
            checkpoint_first=len(groups) > 1,
            stop=asked.file.resolve(),
            tensorboard=tensorboard,
        )
        for i, group in enumerate(groups)
    ]
    with asked:
        left = _run(jobs, n_workers, progress, asked)
    if left or asked.asked:
        raise Stopped(f"{run.path}: {_where(left)}", asked.status)
    rerank_if_wanted(run, dataset, device=device, workers=workers, progress=progress)
    model = run.load(wanted, device=devices[0])
    if temporary is not None:
        weakref.finalize(model, temporary.cleanup)
    return model


def _run(jobs: Sequence[Job], n_workers: int, progress: bool, stop: Stop) -> list[Left]:
    """Run the jobs, in this process if one worker does them all; give those that were stopped."""
    ends: list[Left] = []
    while jobs:
        done = _attempt(jobs, n_workers, progress, stop)
        too_large = [job for job, end in zip(jobs, done, strict=True) if isinstance(end, TooLarge)]
        ends += [end for end in done if isinstance(end, Left)]
        for job in too_large:
            if len(job.repetitions) > 1 and checkpoint_path(job.run, job.repetitions).exists():
                split_checkpoint(job.run, job.repetitions, [half.repetitions for half in _halves(job)])
        jobs = [half for job in too_large for half in _halves(job)]
    return ends


def _attempt(jobs: Sequence[Job], n_workers: int, progress: bool, stop: Stop) -> list[Left | TooLarge | None]:
    """Run the jobs once; say of each that it is done (None), was stopped, or did not fit the memory."""
    logs = {format_repetitions(job.repetitions): log_path(job.run, job.repetitions) for job in jobs}
    with Watch(logs, shown=progress):
        if n_workers == 1:
            return [_train_if_it_fits(job, stop) for job in jobs]
        try:
            parallel = joblib.Parallel(n_jobs=n_workers, backend="loky", initializer=leave_interrupts_to_the_parent)
            return list(parallel(joblib.delayed(_train_if_it_fits)(job) for job in jobs))
        except TerminatedWorkerError as error:
            if stop.asked:  # it went to the workers, too, and one was not listening yet, or no more
                raise Stopped(f"{jobs[0].run}: stopped at the last checkpoints", stop.status) from error
            finished = set(Run.open(jobs[0].run).finished())
            left = [job for job in jobs if not set(job.repetitions) <= finished]
            if all(len(job.repetitions) == 1 for job in left):
                raise ModelError(
                    f"{jobs[0].run}: a worker was killed, perhaps for lack of memory; go on with --resume, with fewer workers"
                ) from error
            return [_too_large(job) if job in left else None for job in jobs]


@dataclass(frozen=True, slots=True)
class TooLarge:
    """What a group gives that did not fit the memory, or whose worker was killed, as systems do that run out of it."""


def _train_if_it_fits(job: Job, stop: Stop | None = None) -> Left | TooLarge | None:
    try:
        return train_group(job, stop)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        if len(job.repetitions) == 1:
            run = Run.open(job.run)
            lower = what_to_lower(run.config, run.sizes, torch.device(job.device))
            raise ModelError(
                f"{job.run}: repetition {job.repetitions[0]} alone does not fit the memory of {job.device} ({error}): {lower}"
            ) from error
    gc.collect()  # the error is gone here, and with it the frames that hold the group
    if job.device.startswith("cuda"):
        torch.cuda.empty_cache()
    return _too_large(job)


def _too_large(job: Job) -> TooLarge:
    """Say in the group's log what will be done."""
    if len(job.repetitions) > 1:
        names = " and ".join(format_repetitions(half.repetitions) for half in _halves(job))
        text = f"repetitions {format_repetitions(job.repetitions)} do not fit the memory together: {names} go on apart"
        path = checkpoint_path(job.run, job.repetitions)
        at_step = int(read_progress(path)["step"]) if path.exists() else 0
        append_warning(log_path(job.run, job.repetitions), text, at_step=at_step)
    return TooLarge()


def _halves(job: Job) -> list[Job]:
    """Cut a group in two; a group of one stays, to be tried once more."""
    half = -(-len(job.repetitions) // 2)
    parts = [job.repetitions[:half], job.repetitions[half:]]
    return [replace(job, repetitions=part, checkpoint_first=True) for part in parts if part]


def _group_size(run: Run, devices: Sequence[str], n_workers: int) -> int:
    device = torch.device(devices[0])
    a_device = -(-n_workers // len(devices))
    return group_size(run.config, run.sizes, free_bytes=free_memory(device), n_workers=a_device, device=device)


def _where(left: Sequence[Left]) -> str:
    """Say where stopped groups stand."""
    if not left:
        return "stopped after the last step"
    return "stopped " + ", ".join(
        f"at step {end.step:,} of {end.n_steps:,} (repetitions {format_repetitions(end.repetitions)}"
        + (f", without room to keep the {end.lost:,} steps after it)" if end.lost else ")")
        if end.n_steps
        else f"before repetitions {format_repetitions(end.repetitions)}"
        for end in left
    )


def _wanted(config: Config, sizes: Sizes, repetitions: Sequence[int] | None) -> list[int]:
    n_repetitions = config.n_repetitions(sizes.n_labels, sizes.labels_a_sample)
    wanted = sorted(set(range(n_repetitions) if repetitions is None else repetitions))
    if not wanted or min(wanted) < 0:
        raise ConfigError(f"repetitions={wanted} must be numbers from 0 on, at least one")
    if config.table == "identity" and wanted != [0]:
        raise ConfigError(f"repetitions={wanted}: the full head (table='identity') has one repetition, number 0")
    return wanted


def _temporary() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="mach-")
    return Path(folder.name), folder
