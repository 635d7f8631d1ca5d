"""Train an ensemble: plan its groups and let joblib run them over the devices there are."""

from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mach.config import Config
from mach.data import Dataset
from mach.errors import ConfigError, ModelError, Stopped
from mach.files import clear_leftovers, free_bytes
from mach.model import Model, resolve_device
from mach.parallel.plan import disk_bytes, group_size, plan_groups
from mach.parallel.progress import Watch
from mach.store.folder import Run, format_repetitions
from mach.train.checkpoint import FOLDER, best_path, read_progress
from mach.train.group import Job, Left, train_group
from mach.train.log import log_path
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
) -> Model:
    """Train an ensemble, or some of its repetitions, into a run folder, and load it.

    Repetitions that are finished there stay as they are, so an ensemble grows, and a lost repetition is trained alone.

    Args:    out, the run folder; without it, a temporary one that lives as long as the model.
             repetitions, their numbers; without them 0..R-1 of the config.
             device, `auto` (every GPU, or the CPU), `cpu` or `cuda:i`; workers, processes (default: one a GPU, or one).
             resume, go on from the checkpoints of a run that was stopped: same bits as if it never had been.
             checkpoint_s, seconds between checkpoints; progress, bars on the terminal.
             stop, a file: once it exists, training stops as after a signal.
    Raises:  ConfigError, DataError or ModelError: what came, what is allowed, what to do.
             Stopped, a KeyboardInterrupt, after SIGTERM or Ctrl-C: each group has ended its step and written its checkpoint, and
             resume=True goes on. A second signal stops at once.
    """
    wanted = _wanted(config, repetitions)
    folder, temporary = (Path(out), None) if out is not None else _temporary()
    devices = _devices(device)
    n_workers = len(devices) if workers is None else workers
    if n_workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    run = Run.create(folder, config, dataset)
    clear_leftovers(run.path, run.path / FOLDER)
    begun = _underway(run, wanted, resume)
    groups = plan_groups(
        wanted,
        finished=run.finished(),
        underway=begun,
        n_workers=n_workers,
        group_size=group_size(config, run.sizes, memory_bytes=_memory(devices[0]), n_workers=-(-n_workers // len(devices))),
    )
    _refuse_full_disk(run, groups, n_workers)
    asked = Stop(run.path / f".stop.{os.getpid()}.tmp" if stop is None else Path(stop))
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
    model = run.load(wanted, device=devices[0])
    if temporary is not None:
        weakref.finalize(model, temporary.cleanup)
    return model


def _run(jobs: Sequence[Job], n_workers: int, progress: bool, stop: Stop) -> list[Left]:
    """Run the jobs, in this process if one worker does them all; give those that were stopped."""
    logs = {format_repetitions(job.repetitions): log_path(job.run, job.repetitions) for job in jobs}
    with Watch(logs, shown=progress):
        if n_workers == 1:
            ends = [train_group(job, stop) for job in jobs]
        else:
            try:
                parallel = joblib.Parallel(n_jobs=n_workers, backend="loky", initializer=leave_interrupts_to_the_parent)
                ends = parallel(joblib.delayed(train_group)(job) for job in jobs)
            except TerminatedWorkerError as error:
                if stop.asked:  # it went to the workers, too, and one was not listening yet, or no more
                    raise Stopped(f"{jobs[0].run}: stopped at the last checkpoints", stop.status) from error
                raise ModelError(
                    f"{jobs[0].run}: a worker was killed, perhaps for lack of memory; go on with --resume, with fewer workers"
                ) from error
    return [end for end in ends if end is not None]


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


def _wanted(config: Config, repetitions: Sequence[int] | None) -> list[int]:
    wanted = sorted(set(range(config.n_repetitions()) if repetitions is None else repetitions))
    if not wanted or min(wanted) < 0:
        raise ConfigError(f"repetitions={wanted} must be numbers from 0 on, at least one")
    if config.table == "identity" and wanted != [0]:
        raise ConfigError(f"repetitions={wanted}: the full head (table='identity') has one repetition, number 0")
    return wanted


def _underway(run: Run, wanted: Sequence[int], resume: bool) -> list[list[int]]:
    """Give the groups that left checkpoints; refuse to pass over their work silently. Clear away what finished ones left."""
    finished = set(run.finished())
    begun = []
    for file in sorted((run.path / FOLDER).glob("group-*.safetensors")):
        progress = read_progress(file)
        group = progress["repetitions"]
        if progress["run"] != run.manifest["key"]:
            raise ModelError(f"{file}: the checkpoint is of another run, copied here by mistake; delete it")
        if set(group) <= finished:
            file.unlink(missing_ok=True)
        elif set(group) & set(wanted):
            begun.append(group)
    for r in finished:
        best_path(run.path, r).unlink(missing_ok=True)
    if begun and not resume:
        names = ", ".join(map(format_repetitions, begun))
        raise ModelError(f"{run.path}: repetitions {names} are under way here; add --resume to go on, or choose another --out")
    partial = [group for group in begun if not set(group) <= set(wanted)]
    if partial:
        raise ModelError(
            f"{run.path}: repetitions {format_repetitions(partial[0])} were begun together; resume all of them, or delete "
            f"{run.path / FOLDER} to start them again"
        )
    return begun


def _refuse_full_disk(run: Run, groups: Sequence[Sequence[int]], n_workers: int) -> None:
    """Refuse to begin what the file system has no room for; checkpoints that are there already are not counted twice."""
    held = sum(file.stat().st_size for file in (run.path / FOLDER).glob("*.safetensors"))
    needed, free = disk_bytes(run.config, run.sizes, groups, n_workers=n_workers) - held, free_bytes(run.path)
    if groups and needed > free:
        raise ModelError(
            f"{run.path}: training writes {needed:,} more bytes of checkpoints and finished repetitions at its fullest, and "
            f"{free:,} are free there; free some space, choose another --out, or train fewer --repetitions at a time"
        )


def _devices(name: str) -> list[str]:
    """Give the devices that a name stands for: every GPU for `auto`, where there are any."""
    n_gpus = torch.cuda.device_count()
    return [f"cuda:{i}" for i in range(n_gpus)] if name == "auto" and n_gpus else [str(resolve_device(name))]


def _memory(device: str) -> int:
    """Give the bytes of memory of a device."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _temporary() -> tuple[Path, tempfile.TemporaryDirectory[str]]:
    folder = tempfile.TemporaryDirectory(prefix="mach-")
    return Path(folder.name), folder
