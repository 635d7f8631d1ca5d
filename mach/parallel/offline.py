"""Predict a split with several processes: each loads the model once and writes every W-th part of the prediction file."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import joblib
import torch
from joblib.externals.loky.process_executor import TerminatedWorkerError

from mach.config import Estimator
from mach.data import Dataset
from mach.errors import ConfigError, ModelError, Stopped
from mach.model import DEFAULT_ESTIMATOR, Model, resolve_precision
from mach.parallel.devices import devices_of
from mach.store.calibration import trust_in
from mach.store.folder import Run
from mach.store.predictions import Choice, Parts, plan, write_parts
from mach.train.stop import Stop, leave_interrupts_to_the_parent

LOOK_S = 0.25  # between looks at what workers have finished

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """One worker's share, in plain values that travel to any process."""

    run: Path
    data: Path
    split: str
    repetitions: tuple[int, ...]
    rerank: bool
    approximate: bool
    device: str
    threads: int  # of the CPU
    parts: Parts
    some: tuple[int, ...]  # of the parts
    restrict: Path | None
    exclude: Path | None
    stop: Path  # a file whose appearance asks to stop


def predict(
    run: str | Path,
    data: str | Path,
    out: str | Path,
    *,
    split: str = "test",
    k: int | None = None,
    estimator: Estimator = DEFAULT_ESTIMATOR,
    repetitions: Sequence[int] | None = None,
    skip_broken: bool = False,
    rerank: bool = True,
    approximate: bool = False,
    restrict: str | Path | None = None,
    exclude: str | Path | None = None,
    probabilities: bool = False,
    precision: float | None = None,
    min_probability: float | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: Progress | None = None,
) -> int:
    """Predict every sample of a split of the data set `data` into the Parquet file `out`; give the number of rows.

    Any number of workers gives the same file, as long as a matrix product has the same bits on as many threads as each of them
    gets. What an earlier call left is gone on from.

    Args:   k, labels a sample (default 100, or all); rerank, with the run's re-ranker if it has one; restrict and exclude, files
            of labels to choose among, and of what each sample may not find (`mach.data.lists`); workers, processes (default: one
            a GPU, or one).
            approximate, scores of products as training makes them, in bfloat16 where the device has it: good enough for lists
            that something else will order.
            probabilities, a column of them, from the run's calibration; precision and min_probability, keep only labels above the
            threshold that was found for this precision, or at least this probable, and give the column, too. They were fitted
            where all labels may be found: with restrict or exclude they may be off.
    Raises: ConfigError, DataError or ModelError: what came, what is allowed, what to do.
            Stopped, a KeyboardInterrupt, after SIGTERM or Ctrl-C: each worker has finished its part, and the same call goes on.
    """
    devices = devices_of(device)
    n_workers = len(devices) if workers is None else workers
    if n_workers < 1:
        raise ConfigError(f"workers={workers} must be at least 1")
    opened, dataset = Run.open(run), Dataset.open(data)
    model = opened.load(repetitions, skip_broken=skip_broken, device=devices[0] if n_workers == 1 else "cpu", rerank=rerank)
    model = _approximate(model) if approximate else model
    n_samples, n_labels = dataset.split(split).n_samples, model.sizes.n_labels
    choice = Choice.read(n_samples, n_labels, model.label_names, restrict=restrict, exclude=exclude)
    k = choice.default_k(n_labels) if k is None else k
    wanted: dict[str, Any] = {"probabilities": probabilities, "precision": precision, "min_probability": min_probability}
    trust, key = trust_in(opened.path, model, estimator, **wanted), opened.manifest["key"]
    parts = plan(model, dataset, split, out, k=k, estimator=estimator, run_key=key, choice=choice, trust=trust)
    with parts.open():
        left = parts.left()
        asked = Stop(parts.folder / f".stop.{os.getpid()}.tmp")
        asked.file.unlink(missing_ok=True)  # of a killed process that had the same number
        with asked, _told(parts, left, progress):
            if n_workers == 1:
                for _ in write_parts(model, dataset.split(split), parts, _until(asked, left), choice):
                    pass
            else:
                works = [
                    Work(
                        run=opened.path.resolve(),
                        data=dataset.path.resolve(),
                        split=split,
                        repetitions=model.table.repetitions,
                        rerank=model.reranker is not None,
                        approximate=approximate,
                        device=devices[worker % len(devices)],
                        threads=max(1, (os.cpu_count() or 1) // n_workers),
                        parts=replace(parts, out=parts.out.resolve()),
                        some=tuple(left[worker::n_workers]),
                        restrict=None if restrict is None else Path(restrict).resolve(),
                        exclude=None if exclude is None else Path(exclude).resolve(),
                        stop=asked.file.resolve(),
                    )
                    for worker in range(n_workers)
                ]
                del model
                _run([work for work in works if work.some], n_workers, asked)
        n_left = sum(len(parts.rows(part)) for part in parts.left())
        if n_left:
            raise Stopped(f"{parts.out}: stopped after {n_samples - n_left:,} of {n_samples:,} rows", asked.status)
    return n_samples


def _run(works: Sequence[Work], n_workers: int, stop: Stop) -> None:
    try:
        parallel = joblib.Parallel(n_jobs=n_workers, backend="loky", initializer=leave_interrupts_to_the_parent)
        parallel(joblib.delayed(_work)(work) for work in works)
    except TerminatedWorkerError as error:
        if not stop.asked:  # it went to the workers, too
            raise ModelError(
                f"{works[0].parts.out}: a worker was killed, perhaps for lack of memory; run the same command again to go on, "
                "with fewer workers"
            ) from error


def _work(work: Work) -> None:
    """Write one worker's parts."""
    torch.set_num_threads(work.threads)
    model: Model = Run.open(work.run).load(work.repetitions, device=work.device, rerank=work.rerank)
    model = _approximate(model) if work.approximate else model
    samples = Dataset.open(work.data).split(work.split)
    choice = Choice.read(samples.n_samples, model.sizes.n_labels, model.label_names, restrict=work.restrict, exclude=work.exclude)
    with Stop(work.stop) as stop:
        for _ in write_parts(model, samples, work.parts, _until(stop, work.some), choice):
            pass


def _approximate(model: Model) -> Model:
    return replace(model, products=resolve_precision(model.config.precision, model.device))


def _until(stop: Stop, some: Sequence[int]) -> Iterator[int]:
    """Yield parts until somebody asks to stop."""
    for part in some:
        if stop.asked:
            return
        yield part


@contextmanager
def _told(parts: Parts, left: Sequence[int], progress: Progress | None) -> Iterator[None]:
    """Tell `progress` what is finished while the block runs, whoever finishes it: the files are looked at."""
    if progress is None:
        yield
        return
    waiting, ended = set(left), threading.Event()

    def tell() -> None:
        waiting.difference_update([part for part in waiting if parts.file(part).exists()])
        progress(parts.n_rows - sum(len(parts.rows(part)) for part in waiting), parts.n_rows)

    def follow() -> None:
        while not ended.wait(LOOK_S):
            tell()

    tell()
    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        tell()
