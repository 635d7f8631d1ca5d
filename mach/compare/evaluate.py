"""Predictions against the truth: every metric of a split, in memory that does not grow with its samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mach.data import Dataset, take_rows
from mach.errors import ConfigError, DataError, nearest
from mach.metrics import PROPENSITY_AB, Evaluator, propensities
from mach.store.predictions import read_facts, read_predictions


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

    Raises: DataError if the file is of another data set or split.
    """
    facts = read_facts(predictions)
    for name, expected in (("data", dataset.fingerprint), ("split", split)):
        if facts[name] != expected:
            raise DataError(f"{predictions}: is of {name} {facts[name]}, not of {expected}; predict this split first")
    evaluator = evaluator_for(dataset, propensity=propensity, threshold=threshold)
    truth = dataset.split(split).labels
    for rows, top in read_predictions(predictions):
        evaluator.update(top.labels, top.scores, take_rows(truth, rows))
    return evaluator.result()
