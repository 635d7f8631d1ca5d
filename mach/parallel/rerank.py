"""Fit the second stage of a finished ensemble: shortlists of the training samples, the weights, and what weighs them."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mach.data import CSR, Dataset, take_rows
from mach.decoding.rerank import DEFAULT_WEIGHT, Evidence, Neighbours, Network, Opinions, Reranker, fit_margins, fit_prototypes
from mach.draw import progress_bar
from mach.errors import ConfigError, ModelError, Stopped
from mach.model import Sizes
from mach.parallel.judge import Choice, Heard, Judge
from mach.parallel.memory import is_out_of_memory
from mach.parallel.offline import predict
from mach.store import Run
from mach.store.predictions import read_facts, read_predictions
from mach.store.reranker import reranker_record, save_reranker
from mach.train.loop import held_out_rows
from mach.train.memory import peak_bytes
from mach.train.stop import Stop

SHORTLISTS = "shortlists.parquet"
NEAR = "near.tmp"  # what is near to each training sample: int32 (N, listed)
NEAR_ENTRIES = 1 << 13  # read to find what is near to a training sample, which makes negatives of it: roughly will do
DEFAULT_COST = 0.2  # see experiments/accuracy/rerank
COSTS = (DEFAULT_COST, 1.0)  # tried where samples can tell which is better
FEWEST = 32  # samples that networks are trained on

Lists = Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]


def rerank(
    out: str | Path,
    dataset: Dataset,
    *,
    settings: Mapping[str, Any] | None = None,
    device: str = "auto",
    workers: int | None = None,
    progress: bool = False,
) -> Reranker:
    """Fit a re-ranker to the finished repetitions of a run folder, and store it there in place of an earlier one.

    The samples that training held out, or the dev split, tell which cost is best, train the networks that weigh what is known of
    a label, and tell whether labels that neighbours vote for are worth a place; nothing else is fitted on them. What was
    stopped goes on: finished parts of the shortlists are kept.

    Args:   settings, some of `rerank`, `rerank_cost` and `rerank_weight`, in place of the run's; device and workers as for
            `predict`; progress, bars on the terminal.
    Raises: ConfigError if no labels are to be ordered or features are dense; ModelError if a repetition is missing, the data set
            is not the run's, or the disk refuses; Stopped as `predict`.
    """
    run = Run.open(out)
    config = run.config.replace(**settings or {})
    depth = min(config.n_reranked(run.sizes.features), run.sizes.n_labels)
    if not depth:
        raise ConfigError(f"{run.path}: rerank=0: give the number of labels to order anew, such as --rerank 20")
    if run.manifest["data"] != dataset.fingerprint:
        raise ModelError(f"{run.path}: was trained on another data set than {dataset.path}; give that one")
    listed = n_listed(run.sizes, depth)
    began, lists = time.perf_counter(), run.path / SHORTLISTS
    if lists.exists() and [(facts := read_facts(lists))["k"], facts["repetitions"]] != [listed, run.finished()]:
        lists.unlink()  # of other settings, or of fewer repetitions
    if not lists.exists():
        with progress_bar("shortlists", shown=progress) as tell:
            how: dict[str, Any] = {"split": "train", "k": listed, "rerank": False, "approximate": True}
            predict(run.path, dataset.path, lists, **how, device=device, workers=workers, progress=tell)
    listed_s = time.perf_counter() - began
    train, held = dataset.split("train"), held_out_rows(run.config, dataset)
    judge = Judge.of(run, dataset, held, depth, device)
    weight = DEFAULT_WEIGHT if isinstance(config.rerank_weight, str) else config.rerank_weight
    costs = (config.rerank_cost,) if isinstance(config.rerank_cost, float) else COSTS if judge else COSTS[:1]
    features, used_N = _sparse(train.features), np.ones(train.n_samples, np.bool_)
    used_N[held] = False
    heard, near_N = None, None
    with Stop(run.path / f".stop.{os.getpid()}.tmp") as stop:
        if judge and config.rerank_weight == "auto" and len(judge.features) >= FEWEST:
            neighbours = Neighbours.of(features, train.labels, used_N)
            heard = judge.hear(Evidence(*fit_prototypes(features, train.labels, used_N), neighbours))
            if heard.near.shape[1]:
                with progress_bar("near labels", shown=progress) as tell:
                    near_N = _near(run.path / NEAR, neighbours, features, used_N, lists, _told(run, stop, tell))
        with progress_bar("re-ranker", shown=progress) as tell:
            told = _told(run, stop, tell)
            fits = fit_margins(features, train.labels, lambda: _shortlists(lists, used_N, near_N), costs=costs, progress=told)
    with progress_bar("networks", shown=progress and heard is not None):
        choice = judge.best(fits, weight, heard) if judge else Choice(0, weight, None)
    opinions = None if choice.network is None or heard is None else _opinions(choice.network, heard)
    best = Reranker(fits[choice.which], depth, choice.weight, opinions)
    record = {
        "cost": costs[choice.which],
        "order": choice.order,
        "chosen_on": judge.name if judge and (heard or len(costs) > 1) else "nothing",
        "listed": listed,
        "repetitions": run.finished(),
        "listed_s": round(listed_s, 3),
        "train_s": round(time.perf_counter() - began, 3),
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }
    save_reranker(run.path, run.manifest["key"], best, record)
    lists.unlink()
    (run.path / NEAR).unlink(missing_ok=True)
    return best


def n_listed(sizes: Sizes, depth: int) -> int:
    """Give the labels of a training sample's shortlist: so many more than are ordered anew that some are negatives."""
    return min(sizes.n_labels, depth + math.ceil(sizes.labels_a_sample))


def rerank_if_wanted(run: Run, dataset: Dataset, *, device: str, workers: int | None = None, progress: bool = False) -> None:
    """Fit a re-ranker if a run's settings ask for one that is not there, and all its repetitions are finished.

    Raises: as `rerank`; ModelError if it does not fit the memory.
    """
    if not run.config.n_reranked(run.sizes.features) or run.problems() or reranker_record(run.path) is not None:
        return
    try:
        rerank(run.path, dataset, device=device, workers=workers, progress=progress)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ModelError(
            f"{run.path}: is trained and can be used, but its second stage does not fit the memory of {device} ({error}); fit "
            f"it where there is more: mach rerank {run.path} {dataset.path}"
        ) from error


def _shortlists(file: Path, used_N: npt.NDArray[np.bool_], near_N: npt.NDArray[np.int32] | None) -> Lists:
    """Yield the rows and shortlists of a prediction file, with what is near to each; without the samples that are not used."""
    for rows, top in read_predictions(file):
        some = used_N[rows]
        labels = top.labels[some]
        yield rows[some], np.ascontiguousarray(labels if near_N is None else np.concatenate([labels, near_N[rows[some]]], 1))


def _near(
    path: Path, neighbours: Neighbours, features: CSR, used_N: npt.NDArray[np.bool_], file: Path, told: Callable[[int, int], None]
) -> npt.NDArray[np.int32]:
    """Write what is near to each used sample and not on its shortlist, as many labels as there; map it, (N, listed).

    Raises: ModelError if the disk refuses.
    """
    kept_N = np.cumsum(used_N) - 1  # which of the neighbours a used sample is itself
    try:
        with path.open("wb") as out:
            for rows, top in read_predictions(file):
                found = np.full(top.labels.shape, -1, np.int64)
                some = used_N[rows]
                around = neighbours.find(take_rows(features, rows[some]), kept_N[rows[some]], entries=NEAR_ENTRIES)
                found[some] = neighbours.near(around, top.labels.shape[1], top.labels[some])
                out.write(found.astype(np.int32).data)
                told(int(rows[-1]) + 1, len(features))
    except OSError as error:
        raise ModelError(f"{path}: cannot be written ({error}); the repetitions are safe") from error
    return np.memmap(path, np.int32, "r").reshape(len(features), -1)


def _opinions(network: Network, heard: Heard) -> Opinions:
    """Keep training samples only where they are heard."""
    evidence, n_near = heard.evidence, heard.near.shape[1]
    hears = n_near or network.first.size
    return Opinions(evidence if hears else dataclasses.replace(evidence, neighbours=None), network, n_near)


def _told(run: Run, stop: Stop, tell: Callable[[int, int], None]) -> Callable[[int, int], None]:
    """Give what a job calls with (done, total): it tells, and raises Stopped if that is asked."""

    def told(done: int, total: int) -> None:
        tell(done, total)
        if stop.asked and done < total:
            raise Stopped(f"{run.path}: stopped while the re-ranker was fitted", stop.status)

    return told


def _sparse(features: CSR | np.ndarray) -> CSR:
    if not isinstance(features, CSR):
        raise ConfigError("rerank needs sparse features")
    return features
