"""The map from scores to probabilities: against a slow fit, rising for any scores, never certain; thresholds against loops."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import sklearn.isotonic  # noqa: F401  seconds, which are not the first example's
from hypothesis import given
from hypothesis import strategies as st

from mach.calibration import Calibration, fit, naive, thresholds_for
from mach.errors import ConfigError, DataError

finite = st.floats(-1e6, 1e6, width=32)
few = st.integers(-3, 3).map(float)  # so that scores tie
pairs = st.lists(st.tuples(finite | few, st.booleans()), min_size=1, max_size=40)


def calibration(scores, probabilities, **rest):
    return Calibration(knot_scores=np.array(scores, float), knot_probabilities=np.array(probabilities, float), **rest)


# The slow truth: pool neighbours that violate the order until none does.


def slow_fit(each):
    """Give {score: probability} of the isotonic fit, with the two made-up outcomes."""
    groups = {}
    for score, right in [*each, (max(s for s, _ in each), False), (min(s for s, _ in each), True)]:
        groups.setdefault(score, []).append(float(right))
    blocks = [([score], groups[score]) for score in sorted(groups)]
    i = 0
    while i + 1 < len(blocks):
        if np.mean(blocks[i][1]) >= np.mean(blocks[i + 1][1]):
            blocks[i : i + 2] = [(blocks[i][0] + blocks[i + 1][0], blocks[i][1] + blocks[i + 1][1])]
            i = max(0, i - 1)
        else:
            i += 1
    return {score: np.mean(outcomes) for scores, outcomes in blocks for score in scores}


def slow_probability(knots, at):
    """Read a map of {score: probability}: straight lines between, level outside."""
    scores = sorted(knots)
    if at <= scores[0]:
        return knots[scores[0]]
    for low, high in pairwise(scores):
        if at <= high:
            return knots[low] + (at - low) / (high - low) * (knots[high] - knots[low])
    return knots[scores[-1]]


@given(pairs, st.lists(finite | few, max_size=9))
def test_the_fit_is_the_slow_one(each, others):
    fitted = calibration(*fit(*map(np.array, zip(*each, strict=True))))
    expected = slow_fit(each)
    at = [*expected, *others]
    assert fitted.probabilities(at) == pytest.approx([slow_probability(expected, s) for s in at], abs=1e-6)


@given(pairs, st.lists(finite | few, min_size=2, max_size=40))
def test_probabilities_rise_with_the_score_and_are_never_certain(each, others):
    fitted = calibration(*fit(*map(np.array, zip(*each, strict=True))))
    knots = fitted.knot_scores.astype(np.float32)
    near = [np.nextafter(knots, np.float32(-np.inf)), knots, np.nextafter(knots, np.float32(np.inf))]
    at = np.sort(np.concatenate([np.array(others, np.float32), *near]))
    found = fitted.probabilities(at)
    assert found.dtype == np.float32 and (np.diff(found) >= 0).all() and ((found > 0) & (found < 1)).all()


@given(st.lists(finite, min_size=1, max_size=9, unique=True), st.data())
def test_any_map_rises_in_floating_point_too(scores, data):
    shares = st.floats(0, 1)
    probabilities = data.draw(st.lists(shares, min_size=len(scores), max_size=len(scores)).map(sorted))
    at = np.sort(np.array(data.draw(st.lists(st.floats(-2e6, 2e6), min_size=2, max_size=30)) + scores))
    found = calibration(sorted(scores), probabilities).probabilities(at)
    assert (np.diff(found) >= 0).all() and found.min() >= np.float32(probabilities[0]) and found.max() <= 1


def test_rounding_at_the_end_of_a_line_does_not_pass_its_knot():
    """Just below the knot the line is at its end already, and low + (high - low) is a little more than high here."""
    low, high = float.fromhex("0x1.ec8da37b81a9ep-5"), float.fromhex("0x1.eef3aefffffffp-3")
    assert np.float32(low + (high - low)) > np.float32(high)
    below, at = calibration([-1000.0, 1e-3, 1.0], [low, high, high]).probabilities([np.nextafter(1e-3, 0), 1e-3])
    assert below <= at


def test_equal_scores_are_one_and_the_shape_is_kept():
    fitted = calibration(*fit([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]], [[True, False], [True, False], [False, True]]))
    found = fitted.probabilities([[1.0, 1.5, 2.0]])
    assert found == pytest.approx(np.array([[2 / 4, 2 / 4, 2 / 4]]))  # (1 + 1) / 4 below, 2 / 4 above
    assert found.shape == (1, 3) and fitted.probabilities(2.0).shape == ()


def test_n_that_were_all_right_are_not_certain():
    fitted = calibration(*fit([0.0] * 9 + [1.0] * 9, [False] * 9 + [True] * 9))
    assert fitted.probabilities([-5, 0, 0.5, 1, 5]) == pytest.approx([0.1, 0.1, 0.5, 0.9, 0.9])


def test_what_cannot_be_fitted_is_named():
    for scores in ([], [1.0, math.nan], [math.inf, 0.0]):
        with pytest.raises(DataError, match="a calibration needs scores, all of them finite numbers"):
            fit(scores, [True] * len(scores))


@pytest.mark.parametrize(
    ("scores", "probabilities"),
    [([0, 0], [0, 1]), ([1, 0], [0, 1]), ([0, 1], [1, 0]), ([0, 1], [-0.1, 1]), ([0, 1], [0, 1.1]), ([0, math.nan], [0, 1])],
)
def test_what_is_no_map_is_refused(scores, probabilities):
    with pytest.raises(ConfigError, match=r"scores must rise, and its probabilities never fall and lie in \[0, 1\]"):
        calibration(scores, probabilities)
    with pytest.raises(ConfigError, match=r"a probability for each of its scores, got shapes \(2,\) and \(3,\)"):
        calibration([0, 1], [0, 1, 1])


# Thresholds.


def slow_threshold(rows, n_true, wanted):
    """Give (score, precision, recall, coverage, kept), trying every score there is from the least."""
    for score in sorted({s for row in rows for s, _ in row}):
        kept = [right for row in rows for s, right in row if s >= score]
        if sum(kept) / len(kept) >= wanted:
            coverage = sum(any(s >= score for s, _ in row) for row in rows) / len(rows)
            return score, sum(kept) / len(kept), sum(kept) / max(1, n_true), coverage, len(kept)
    return None


rows_of_pairs = st.integers(1, 4).flatmap(
    lambda k: st.lists(st.lists(st.tuples(few | finite, st.booleans()), min_size=k, max_size=k), min_size=1, max_size=9)
)


@given(rows_of_pairs, st.integers(0, 3), st.sampled_from([0.01, 0.3, 0.5, 2 / 3, 0.9, 1.0]))
def test_thresholds_are_the_slow_ones(rows, n_missed, wanted):
    scores, right = (np.array([[pair[i] for pair in row] for row in rows]) for i in (0, 1))
    n_true = int(right.sum()) + n_missed
    (found,) = thresholds_for(scores, right.astype(bool), n_true, [wanted])
    expected = slow_threshold(rows, n_true, wanted)
    if expected is None:
        assert (found.wanted, found.score, found.n_kept) == (wanted, None, 0)
    else:
        got = (found.score, found.precision, found.recall, found.coverage, found.n_kept)
        assert got == pytest.approx(expected, abs=1e-12) and found.precision >= wanted


def test_a_threshold_is_asked_for_by_its_precision():
    found = thresholds_for(np.array([[2.0, 1.0], [1.5, 0.0]]), np.array([[True, False], [False, False]]), 2, [0.5, 0.9])
    assert [t.score for t in found] == [1.5, 2.0]
    some = calibration([0.0], [0.5], thresholds=(*found, *thresholds_for(np.zeros((1, 1)), np.zeros((1, 1), bool), 1, [1.0])))
    assert some.threshold(0.9) is found[1]
    with pytest.raises(ConfigError, match=r"precision=1 is reached by no score of the calibration; reached: 0.5, 0.9"):
        some.threshold(1.0)
    with pytest.raises(ConfigError, match=r"precision=0\.8 has no threshold \(there are: 0.5, 0.9\); calibrate again with --p"):
        some.threshold(0.8)
    with pytest.raises(ConfigError, match=r"there are: none"):
        calibration([0.0], [0.5]).threshold(0.8)


# Without a calibration.


@given(
    st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=1, max_size=9),
    st.sampled_from(["logits", "log-probs", "mean", "min", "median"]),
)
def test_naive_shares_lie_between_0_and_1_and_keep_the_order(scores, estimator):
    shares = naive(np.array([sorted(scores)], np.float32), estimator, 4)[0].tolist()
    assert all(0 <= share <= 1 for share in shares) and shares == sorted(shares)


def test_naive_shares_are_means_over_the_repetitions():
    assert naive(np.array([[0.0, 4 * math.log(3)]]), "logits", 4).tolist() == [[0.5, pytest.approx(0.75)]]
    assert naive(np.array([[2 * math.log(0.3)]]), "log-probs", 2).tolist() == [[pytest.approx(0.3)]]
    assert naive(np.array([[-0.1, 0.4]]), "mean", 2).tolist() == [[0.0, 0.4]]
