"""Fit the second stage of a finished ensemble: shortlists of the training samples, the weights, and how much they count."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from mach.data import CSR, Dataset, take, take_rows
from mach.decoding import TopK
from mach.decoding.rerank import DEFAULT_WEIGHT, Reranker, add_prototypes, best_mix, fit_prototypes, fit_reranker
from mach.decoding.rerank.weight import SAMPLES, WEIGHTS, Mix
from mach.draw import progress_bar
from mach.errors import ConfigError, ModelError, Stopped
from mach.metrics import hits
from mach.model import Sizes
from mach.parallel.devices import devices_of
from mach.parallel.offline import predict
from mach.store import Run
from mach.store.predictions import read_facts, read_predictions
from mach.store.reranker import reranker_record, save_reranker
from mach.train.loop import held_out_rows
from mach.train.memory import peak_bytes
from mach.train.stop import Stop

SHORTLISTS = "shortlists.parquet"
DEFAULT_COST = 0.2  # see experiments/accuracy/rerank
COSTS = (DEFAULT_COST, 1.0)  # tried where samples can tell which is better


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

    The samples that training held out, or the dev split, tell which cost is best and how much a margin and a label's prototype
    count beside a mean logit; they are not fitted on. What was stopped goes on: finished parts of the shortlists are kept.

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
            how: dict[str, Any] = {"split": "train", "k": listed, "rerank": False}
            predict(run.path, dataset.path, lists, **how, device=device, workers=workers, progress=tell)
    listed_s = time.perf_counter() - began
    train, held = dataset.split("train"), held_out_rows(run.config, dataset)
    judge = _Judge.of(run, dataset, held, depth, device)
    costs = (config.rerank_cost,) if isinstance(config.rerank_cost, float) else COSTS if judge else COSTS[:1]
    weights = (config.rerank_weight,) if isinstance(config.rerank_weight, float) else WEIGHTS
    tried: list[Reranker] = []
    with Stop(run.path / f".stop.{os.getpid()}.tmp") as stop, progress_bar("re-ranker", shown=progress) as tell:

        def told(done: int, total: int) -> None:
            tell(len(tried) * total + done, len(costs) * total)
            if stop.asked and done < total:
                raise Stopped(f"{run.path}: stopped while the re-ranker was fitted", stop.status)

        features = _sparse(train.features)
        for cost in costs:
            how = {"cost": cost, "depth": depth, "weight": DEFAULT_WEIGHT, "progress": told}
            tried.append(fit_reranker(features, train.labels, lambda: _shortlists(lists, held), **how))
    mix = Mix(0, weights[0], 0.0)
    if judge:
        prototypes = fit_prototypes(features, train.labels, ~np.isin(np.arange(train.n_samples), held), depth=depth)
        mix = judge.mix(tried, prototypes, weights)
    best = tried[mix.which]
    if mix.prototype:
        best = add_prototypes(best, prototypes, mix.prototype)
    best = replace(best, weight=mix.weight)
    weight_from = "given" if isinstance(config.rerank_weight, float) else judge.name if judge else "default"
    record = {
        "cost": costs[mix.which],
        "prototype": mix.prototype,
        "weight_from": weight_from,
        "listed": listed,
        "repetitions": run.finished(),
        "listed_s": round(listed_s, 3),
        "train_s": round(time.perf_counter() - began, 3),
        "peak_bytes": peak_bytes(torch.device("cpu")),
    }
    save_reranker(run.path, run.manifest["key"], best, record)
    lists.unlink()
    return best


def n_listed(sizes: Sizes, depth: int) -> int:
    """Give the labels of a training sample's shortlist: so many more than are ordered anew that some are negatives."""
    return min(sizes.n_labels, depth + math.ceil(sizes.labels_a_sample))


def wants_reranker(run: Run) -> bool:
    """Tell whether a run's settings ask for a re-ranker that is not there, and all its repetitions are finished."""
    wanted = run.config.n_reranked(run.sizes.features) > 0
    return wanted and not run.problems() and reranker_record(run.path) is None


def _shortlists(file: Path, held: npt.NDArray[np.int64]) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Yield the rows and shortlists of a prediction file, without those of the samples held out."""
    for rows, top in read_predictions(file):
        fitted = ~np.isin(rows, held)
        yield rows[fitted], np.ascontiguousarray(top.labels[fitted])


@dataclass(frozen=True, slots=True)
class _Judge:
    """Samples that nothing was trained on, and what decoding finds for them."""

    name: str  # what they are
    features: CSR
    truth: CSR
    top: TopK
    n_repetitions: int

    @classmethod
    def of(cls, run: Run, dataset: Dataset, held: npt.NDArray[np.int64], depth: int, device: str) -> _Judge | None:
        """Take the dev split or what was held out, at most SAMPLES of it, evenly; None if there is nothing."""
        name = "dev" if "dev" in dataset.split_names and dataset.split("dev").n_samples else "held out"
        split = dataset.split("dev" if name == "dev" else "train")
        rows = np.arange(split.n_samples) if name == "dev" else held
        if not len(rows):
            return None
        rows = rows[:: -(-len(rows) // SAMPLES)]
        features, model = take(split.features, rows), run.load(device=devices_of(device)[0], rerank=False)
        top = model.predict_topk(features, depth)
        return cls(name, _sparse(features), take_rows(split.labels, rows), top, len(model.repetitions))

    def mix(self, tried: Sequence[Reranker], prototypes: Reranker, weights: Sequence[float]) -> Mix:
        """Choose which is best, and how much its margins and likeness to prototypes count beside a mean logit."""
        labels, n_true_N = self.top.labels, np.diff(self.truth.indptr)
        *margins, likeness_Nk = [each.margins(self.features, labels) for each in (*tried, prototypes)]
        right_Nk = hits(labels, self.truth).astype(np.bool_)
        return best_mix(self.top.scores / self.n_repetitions, margins, likeness_Nk, right_Nk, n_true_N, weights=weights)


def _sparse(features: CSR | np.ndarray) -> CSR:
    if not isinstance(features, CSR):
        raise ConfigError("rerank needs sparse features")
    return features
