"""Predictions against the truth: every metric of a split, in memory that does not grow with its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mach.data import CSR, Dataset, take_rows
from mach.errors import ConfigError, DataError, nearest
from mach.metrics import PROPENSITY_AB, Evaluator, hits, propensities
from mach.reliability import Reliability
from mach.store.predictions import read_facts, read_groups

RELIABILITY_KS = (1, 5)


def evaluator_for(dataset: Dataset, *, propensity: str = "other", threshold: float | None = None) -> Evaluator:
    """Give an evaluator whose propensities come from the train split's label counts.

    Args:   propensity, whose A and B: amazon (.6, 2.6), wikipedia (.5, .4), other (.55, 1.5).
    Raises: ConfigError if it is none of these.
    """
    if propensity not in PROPENSITY_AB:
        raise ConfigError(
            f"propensity={propensity!r} must be one of {', '.join(PROPENSITY_AB)}{nearest(propensity, PROPENSITY_AB)}"
        )
    labels = dataset.split("train").labels
    weights = None
    if len(labels) >= 3:  # below, propensities are not defined
        counts = np.bincount(labels.indices, minlength=dataset.n_labels)
        a, b = PROPENSITY_AB[propensity]
        weights = propensities(counts, len(labels), a, b)
    return Evaluator(dataset.n_labels, propensities=weights, threshold=threshold)


def evaluate(
    predictions: str | Path, dataset: Dataset, split: str, *, propensity: str = "other", threshold: float | None = None
) -> dict[str, float]:
    """Measure a prediction file against a split: P@k, nDCG@k, R@k, PSP@k, PSnDCG@k, MAP, and F1 where a threshold is given.

    Where the file has probabilities, also ECE@k and Brier@k of the k best labels. Where only labels above a threshold were kept,
    a list ends early: what it lacks is wrong to P@k and the like, and precision, recall and coverage tell of what was kept.

    Raises: DataError if the file is of another data set or split.
    """
    facts = read_facts(predictions)
    for name, expected in (("data", dataset.fingerprint), ("split", split)):
        if facts[name] != expected:
            raise DataError(f"{predictions}: is of {name} {facts[name]}, not of {expected}; predict this split first")
    evaluator = evaluator_for(dataset, propensity=propensity, threshold=threshold)
    truth = dataset.split(split).labels
    kept = _Kept()
    for group in read_groups(predictions):
        true = take_rows(truth, group.rows)
        evaluator.update(group.top.labels, group.top.scores, true)
        if group.probabilities is not None:
            kept.update(group.top.labels, group.probabilities, true)
    return evaluator.result() | kept.result(with_shares="precision" in facts or "min_probability" in facts)


class _Kept:
    """Adds up what is asked of calibrated predictions only."""

    def __init__(self) -> None:
        self._reliability = {k: Reliability() for k in RELIABILITY_KS}
        self._counts = np.zeros(5, np.int64)  # right, kept, true, samples with a label, samples

    def update(self, labels_Nk: np.ndarray, probabilities_Nk: np.ndarray, truth: CSR) -> None:
        right_Nk, is_kept_Nk = hits(labels_Nk, truth), labels_Nk >= 0
        for k, reliability in self._reliability.items():
            if k <= labels_Nk.shape[1]:
                head = is_kept_Nk[:, :k]
                reliability.update(probabilities_Nk[:, :k][head], right_Nk[:, :k][head])
        self._counts += right_Nk.sum(), is_kept_Nk.sum(), truth.nnz, is_kept_Nk.any(1).sum(), len(labels_Nk)

    def result(self, *, with_shares: bool) -> dict[str, float]:
        found = {}
        for name in ("ECE", "Brier"):
            for k, reliability in self._reliability.items():
                if reliability.n:
                    found[f"{name}@{k}"] = reliability.ece() if name == "ECE" else reliability.brier()
        right, kept, true, covered, n_samples = self._counts.tolist()
        shares = {"precision": right / max(1, kept), "recall": right / max(1, true), "coverage": covered / max(1, n_samples)}
        return found | (shares if with_shares else {})
