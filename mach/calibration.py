"""From scores to probabilities: a rising map fitted on samples that no weight has seen, and thresholds for a wanted precision.

A label's score says how it stands against others, not how likely it is right. On held-out samples both are known, so the map is
the rising step function that fits them best (isotonic regression), made a line between steps. Nothing is assumed of the scores:
sums of logits, probabilities and a re-ranker's scores go alike.

Axes: N samples, k labels found of each, M knots of the map, P pairs of a sample and a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.config import Estimator
from mach.errors import ConfigError, DataError

Float64 = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]

LARGEST_OUTPUT = 60.0  # beyond, a sigmoid is 0 or 1 in float64's eyes


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """The least score that gives a wanted precision on the samples of a calibration, and what it gives there."""

    wanted: float  # precision
    score: float | None  # labels of at least this score are kept; None: no score gives this precision
    precision: float = 0.0  # of the labels kept
    recall: float = 0.0  # share of all true labels that are kept
    coverage: float = 0.0  # share of the samples of which a label is kept
    n_kept: int = 0
    held_out: float | None = None  # precision of thresholds that were found on one half of the samples, on the other half


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A map from scores to probabilities that never falls: straight lines between M knots, level beyond the outer two.

    Raises: ConfigError if the knots are not such a map.
    """

    knot_scores: Float64  # (M,), rising
    knot_probabilities: Float64  # (M,), never falling, in [0, 1]
    thresholds: tuple[Threshold, ...] = ()
    of: Mapping[str, Any] = field(default_factory=dict)  # what it was fitted on, and whose scores it reads
    measured: Mapping[str, Any] = field(default_factory=dict)  # how far it can be trusted

    def __post_init__(self) -> None:
        x, p = self.knot_scores, self.knot_probabilities
        if not (x.ndim == 1 and x.shape == p.shape and len(x)):
            raise ConfigError(f"a calibration needs a probability for each of its scores, got shapes {x.shape} and {p.shape}")
        if not (np.isfinite(x).all() and (np.diff(x) > 0).all() and (np.diff(p) >= 0).all() and p[0] >= 0 and p[-1] <= 1):
            raise ConfigError("a calibration's scores must rise, and its probabilities never fall and lie in [0, 1]")

    def probabilities(self, scores: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Give the probability that a label of each score is right: float32, of the same shape.

        A greater score never gives a smaller probability, in floating point, too.
        """
        s = np.asarray(scores, np.float64)
        x, p = self.knot_scores, self.knot_probabilities
        right = np.clip(np.searchsorted(x, s, "right"), 1, max(1, len(x) - 1))
        left = np.minimum(right - 1, len(x) - 1)
        right = np.minimum(right, len(x) - 1)
        width = np.where(right > left, x[right] - x[left], 1.0)
        share = np.clip((s - x[left]) / width, 0.0, 1.0)
        found: npt.NDArray[np.float32] = np.minimum(p[left] + share * (p[right] - p[left]), p[right]).astype(np.float32)
        return found

    def threshold(self, precision: float) -> Threshold:
        """Give the threshold that was found for a wanted precision.

        Raises: ConfigError if none was looked for, or no score gives it: names those there are.
        """
        reached = ", ".join(f"{t.wanted:g}" for t in self.thresholds if t.score is not None) or "none"
        for found in self.thresholds:
            if found.wanted == precision:
                if found.score is None:
                    raise ConfigError(f"precision={precision:g} is reached by no score of the calibration; reached: {reached}")
                return found
        raise ConfigError(
            f"precision={precision:g} has no threshold (there are: {reached}); calibrate again with --precision {precision:g}"
        )


def fit(scores: npt.ArrayLike, right: npt.ArrayLike) -> tuple[Float64, Float64]:
    """Give the knots of the map that fits best: the rising function of the score with the least sum of squares.

    As if the best score had been wrong once more and the worst right once more, so that nothing is certain: n labels that were
    all right give n / (n + 1).

    Args:    scores and whether each one's label was right, of one shape.
    Returns: rising scores (M,) and their probabilities (M,), which lie strictly between 0 and 1.
    Raises:  DataError if there are no scores, or one is not finite.
    Source:  Zadrozny & Elkan, KDD 2002 (isotonic regression for calibration); Ayer et al. 1955 (its algorithm).
    """
    from sklearn.isotonic import isotonic_regression

    s, y = np.asarray(scores, np.float64).ravel(), np.asarray(right, np.float64).ravel()
    if not len(s) or not np.isfinite(s).all():
        raise DataError("a calibration needs scores, all of them finite numbers")
    x, places, n = np.unique(s, return_inverse=True, return_counts=True)
    n_right, weight = np.bincount(places, y), n.astype(np.float64)
    n_right[0] += 1
    weight[0] += 1
    weight[-1] += 1
    p = np.asarray(isotonic_regression(n_right / weight, sample_weight=weight), np.float64)
    is_step = p[1:] != p[:-1]
    is_knot = np.append(True, is_step) | np.append(is_step, True)  # where a level begins or ends
    is_knot[-1] = True
    return x[is_knot], p[is_knot]


def check_share(name: str, value: float) -> None:
    """Raise ConfigError unless a wanted precision or probability lies in (0, 1]."""
    if not 0 < value <= 1:
        raise ConfigError(f"{name}={value:g} must lie in (0, 1]")


def thresholds_for(scores_Nk: npt.NDArray[Any], right_Nk: Bools, n_true: int, wanted: Sequence[float]) -> list[Threshold]:
    """Give for each wanted precision the least score at which the labels of at least this score have it.

    Args: n_true, how many true labels the samples have, found or not; wanted, precisions in (0, 1].
    """
    order = np.argsort(-scores_Nk, axis=None, kind="stable")
    s_P, right_P = scores_Nk.ravel()[order], np.cumsum(right_Nk.ravel()[order])
    ends = np.flatnonzero(np.append(s_P[1:] != s_P[:-1], True)) if len(s_P) else np.zeros(0, np.int64)  # equal scores go together
    precision_P = right_P[ends] / (ends + 1)
    best_N = scores_Nk.max(axis=1, initial=-np.inf)
    found = []
    for precision in wanted:
        enough = np.flatnonzero(precision_P >= precision)
        if not len(enough):
            found.append(Threshold(wanted=float(precision), score=None))
            continue
        end = ends[enough[-1]]
        score = s_P[end]
        found.append(
            Threshold(
                wanted=float(precision),
                score=float(score),
                precision=float(right_P[end] / (end + 1)),
                recall=float(right_P[end] / max(1, n_true)),
                coverage=float((best_N >= score).mean()),
                n_kept=int(end + 1),
            )
        )
    return found


def naive(scores: npt.NDArray[Any], estimator: Estimator, n_repetitions: int) -> Float64:
    """Put scores on a scale from 0 to 1 without a calibration: the mean of logits or of log-probabilities as a probability."""
    s = np.asarray(scores, np.float64)
    if estimator == "logits":
        return np.asarray(1 / (1 + np.exp(-np.maximum(-LARGEST_OUTPUT, s / n_repetitions))))
    if estimator == "log-probs":
        return np.asarray(np.exp(np.minimum(0.0, s / n_repetitions)))
    return np.clip(s, 0.0, 1.0)
