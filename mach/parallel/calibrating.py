"""Calibrate a run: predict samples that no weight has seen, fit the map from scores to probabilities, measure it, keep it.

What is measured is measured by cross-fitting: the map of one half of the samples on the other half, both ways. The map that is
kept is fitted on all of them.

Axes: N samples, k labels found of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.calibration import Bools, Calibration, Threshold, check_share, fit, naive, thresholds_for
from mach.config import Estimator
from mach.data import Dataset, Split, take, take_rows
from mach.errors import DataError
from mach.metrics import hits
from mach.model import DEFAULT_ESTIMATOR, Model
from mach.parallel.devices import devices_of
from mach.reliability import Reliability
from mach.store.calibration import scores_key, write_calibration
from mach.store.folder import Run
from mach.store.predictions import check_fits
from mach.train.loop import held_out_rows

PRECISIONS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
DEPTHS = (1, 5)  # errors are measured over so many of the best labels, and over all that are found
MAX_PAIRS = 1 << 22  # of a sample and a label found: more samples than that are thinned out evenly
BLOCK_ROWS = 4096  # samples predicted together
VALIDATION = "validation"  # the name of what a run held out of its train split


@dataclass(frozen=True, slots=True)
class Found:
    """The labels found for some samples: their scores, whether they are right, and how many are to be found."""

    scores_Nk: npt.NDArray[np.float32]
    right_Nk: Bools
    n_true_N: npt.NDArray[np.int64]

    def rows(self, rows: slice) -> Found:
        """Give some of the samples."""
        return Found(self.scores_Nk[rows], self.right_Nk[rows], self.n_true_N[rows])


def calibrate(
    run: str | Path,
    dataset: Dataset,
    *,
    split: str = "dev",
    k: int | None = None,
    estimator: Estimator = DEFAULT_ESTIMATOR,
    repetitions: Sequence[int] | None = None,
    skip_broken: bool = False,
    precisions: Sequence[float] = PRECISIONS,
    device: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Calibrate a run's scores on a split that it was not trained on, and keep the calibration in the run folder.

    Args:    split, `dev`, `test`, or `validation`: what the run held out of its train split (the setting `validation`).
             k, labels found of each sample (default 100, or all); estimator and repetitions, whose scores are calibrated.
             precisions, for which thresholds are looked for; progress(samples done, samples in all).
    Returns: the calibration; `of` says what it was fitted on, `measured` how far it can be trusted, by cross-fitting.
    Raises:  DataError if there is no such split, or the run was trained on it; ConfigError or ModelError as `predict`.
    """
    for precision in precisions:
        check_share("precision", precision)
    opened = Run.open(run)
    model = opened.load(repetitions, skip_broken=skip_broken, device=devices_of(device)[0])
    check_fits(model, dataset)
    samples, rows = _unseen(opened, dataset, split)
    k = min(100, model.sizes.n_labels) if k is None else k
    n_samples = min(len(rows), max(2, MAX_PAIRS // k))
    if n_samples < 2:
        raise DataError(f"{dataset.path}: split '{split}' has {len(rows)} samples to calibrate on; some hundreds are needed")
    found = _find(model, samples, rows[np.arange(n_samples) * len(rows) // n_samples], k, estimator, progress)
    calibration = fit_found(found, precisions, naive(found.scores_Nk, estimator, len(model.repetitions)))
    of = {
        "run": opened.manifest["key"],
        "scores": scores_key(model, estimator),
        "data": dataset.fingerprint,
        "split": split,
        "n_samples": n_samples,
        "k": k,
    }
    calibration = replace(calibration, of=of)
    write_calibration(opened.path, calibration)
    return calibration


def _unseen(run: Run, dataset: Dataset, split: str) -> tuple[Split, npt.NDArray[np.int64]]:
    """Give the split and its rows that a run may be calibrated on."""
    is_own = dataset.fingerprint == run.manifest["data"]
    if split == VALIDATION:
        if not is_own:
            raise DataError(
                f"{dataset.path}: is not the data set that {run.path} held samples out of; give that, or another split"
            )
        rows = held_out_rows(run.config, dataset)
        if not len(rows):
            instead = "calibrate on that, --split dev" if "dev" in dataset.split_names else "train with --validation 0.1"
            raise DataError(f"{run.path}: held no samples out of its train split; {instead}")
        return dataset.split("train"), rows
    if split == "train" and is_own:
        raise DataError(
            f"{dataset.path}: {run.path} was trained on its split 'train', and scores of samples trained on are too sure; "
            "calibrate on another split, or on samples held out: train with --validation 0.1, then --split validation"
        )
    if split not in dataset.split_names:
        raise DataError(
            f"{dataset.path}: has no split '{split}' to calibrate on; there are: {', '.join(dataset.split_names)}; prepare it "
            "with --dev FILE, or train with --validation 0.1 and calibrate with --split validation"
        )
    samples = dataset.split(split)
    return samples, np.arange(samples.n_samples)


def _find(
    model: Model, samples: Split, rows: npt.NDArray[np.int64], k: int, estimator: Estimator,
    progress: Callable[[int, int], None] | None,
) -> Found:  # fmt: skip
    """Predict some samples, a block at a time: 5 bytes for each of N k are kept."""
    found = Found(np.empty((len(rows), k), np.float32), np.empty((len(rows), k), bool), np.empty(len(rows), np.int64))
    for start in range(0, len(rows), BLOCK_ROWS):
        block = slice(start, min(start + BLOCK_ROWS, len(rows)))
        truth = take_rows(samples.labels, rows[block])
        top = model.predict_topk(take(samples.features, rows[block]), k, estimator=estimator)
        found.scores_Nk[block], found.right_Nk[block] = top.scores, hits(top.labels, truth)
        found.n_true_N[block] = np.diff(truth.indptr)
        if progress:
            progress(block.stop, len(rows))
    return found


def fit_found(found: Found, precisions: Sequence[float], before_Nk: npt.NDArray[np.float64]) -> Calibration:
    """Fit the map and the thresholds on all samples, and measure both by cross-fitting.

    Args: before_Nk, the probabilities that one would take the scores for without a calibration.
    """
    after_Nk = np.empty(found.scores_Nk.shape, np.float32)
    kept = np.zeros((len(precisions), 2), np.int64)  # right, all
    for half in (0, 1):
        one, other = found.rows(slice(half, None, 2)), found.rows(slice(1 - half, None, 2))
        after_Nk[1 - half :: 2] = _map(one).probabilities(other.scores_Nk)
        for i, threshold in enumerate(_thresholds(one, precisions)):
            if threshold.score is not None:
                is_kept_Nk = other.scores_Nk >= threshold.score
                kept[i] += other.right_Nk[is_kept_Nk].sum(), is_kept_Nk.sum()
    thresholds = [
        replace(threshold, held_out=float(right / n)) if n and threshold.score is not None else threshold
        for threshold, (right, n) in zip(_thresholds(found, precisions), kept, strict=True)
    ]
    measured = {"before": _measure(before_Nk, found.right_Nk), "after": _measure(after_Nk, found.right_Nk)}
    return replace(_map(found), thresholds=tuple(thresholds), measured=measured)


def _map(found: Found) -> Calibration:
    scores, probabilities = fit(found.scores_Nk, found.right_Nk)
    return Calibration(knot_scores=scores, knot_probabilities=probabilities)


def _thresholds(found: Found, precisions: Sequence[float]) -> list[Threshold]:
    return thresholds_for(found.scores_Nk, found.right_Nk, int(found.n_true_N.sum()), precisions)


def _measure(probabilities_Nk: npt.NDArray[Any], right_Nk: Bools) -> Mapping[str, Any]:
    """Give the errors over the best labels and over all, and what a reliability diagram draws, as plain values."""
    errors: dict[str, Any] = {}
    for depth in sorted({min(depth, right_Nk.shape[1]) for depth in (*DEPTHS, right_Nk.shape[1])}):
        reliability = Reliability()
        reliability.update(probabilities_Nk[:, :depth], right_Nk[:, :depth])
        errors |= {f"ECE@{depth}": reliability.ece(), f"Brier@{depth}": reliability.brier()}
    return errors | {"bins": [[each.n, each.probability, each.right] for each in reliability.table()]}
