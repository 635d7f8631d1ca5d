"""Which labels a decode may find: a subset for all samples, and for each sample all but some.

Axes: N samples, K labels, L labels excluded in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mach.errors import ConfigError

Int64 = npt.NDArray[np.int64]


class Lists(NamedTuple):
    """A sorted list of labels for each sample: labels[starts[n] : starts[n + 1]]."""

    starts: Int64  # (N + 1,)
    labels: Int64  # (L,)


class Only(NamedTuple):
    """Which labels may be found, as kernels ask it."""

    starts: Int64  # of `without`, (N + 1,)
    without: Int64  # (L,)
    allowed: npt.NDArray[np.uint8]  # (K,), or (0,): all


def no_lists(n_samples: int) -> Lists:
    """Exclude nothing."""
    return Lists(np.zeros(n_samples + 1, np.int64), np.zeros(0, np.int64))


def lists_of(lists: Lists, samples: Int64) -> Lists:
    """Give the lists of some of the samples."""
    return joined([lists.labels[lists.starts[n] : lists.starts[n + 1]] for n in samples])


def joined(rows: Sequence[Int64]) -> Lists:
    """Lay lists end to end."""
    starts = np.zeros(len(rows) + 1, np.int64)
    np.cumsum([len(row) for row in rows], out=starts[1:])
    return Lists(starts, np.concatenate([*rows, np.zeros(0, np.int64)]))


def allowed_of(subset: Int64 | None, n_labels: int) -> npt.NDArray[np.uint8]:
    """Give which labels may be found, as `Only` holds it: those of a subset, or all."""
    if subset is None:
        return np.zeros(0, np.uint8)
    allowed_K = np.zeros(n_labels, np.uint8)
    allowed_K[subset] = 1
    return allowed_K


def check_restrict(restrict: npt.ArrayLike, n_labels: int, k: int) -> Int64:
    """Give the distinct labels of a subset, sorted.

    Raises: ConfigError if there are fewer than k, or one is outside [0, K).
    """
    labels = _labels(restrict, "restrict", n_labels)
    if k > len(labels):
        raise ConfigError(f"k={k} must lie in [1, {len(labels)}], the number of different labels in restrict")
    return labels


def check_exclude(exclude: Sequence[npt.ArrayLike], n_samples: int, n_labels: int, restrict: Int64 | None, k: int) -> Lists:
    """Give the labels that each sample is decoded without, those outside of `restrict` left out.

    Raises: ConfigError if there are not N lists, a label is outside [0, K), or fewer than k labels are left to a sample.
    """
    if len(exclude) != n_samples:
        raise ConfigError(f"exclude holds {len(exclude)} lists of labels, but there are {n_samples} samples: give one each")
    rows = [_labels(row, f"exclude[{n}]", n_labels) for n, row in enumerate(exclude)]
    if restrict is not None:
        rows = [np.intersect1d(row, restrict, assume_unique=True) for row in rows]
    n_allowed = n_labels if restrict is None else len(restrict)
    for n, row in enumerate(rows):
        if k > n_allowed - len(row):
            raise ConfigError(f"k={k} is above the {n_allowed - len(row)} labels that sample {n} is left with: exclude fewer")
    return joined(rows)


def _labels(given: npt.ArrayLike, name: str, n_labels: int) -> Int64:
    labels = np.asarray(given)
    if labels.size == 0:
        return np.zeros(0, np.int64)
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise ConfigError(f"{name} must be a list of label ids, got {labels.dtype} of shape {labels.shape}")
    if labels.min() < 0 or labels.max() >= n_labels:
        raise ConfigError(f"{name}: labels must lie in [0, {n_labels}), got {labels.min()}..{labels.max()}")
    return np.unique(labels).astype(np.int64)
