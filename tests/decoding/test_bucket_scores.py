"""The transform of head outputs, bucket by bucket, against float64."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mach.config import Estimator, Loss
from mach.decoding import reference
from mach.decoding.estimators import bucket_scores
from mach.errors import ConfigError

LOSSES = Loss.__args__
ESTIMATORS = Estimator.__args__


def truth(logits_RB, loss, estimator):
    R, B = logits_RB.shape
    if estimator == "logits":
        return logits_RB.astype(np.float64)
    log_probs_RB = np.array([reference.log_probabilities([float(z) for z in row], loss) for row in logits_RB])
    if estimator == "log-probs":
        return log_probs_RB
    return (B * np.exp(log_probs_RB) - 1) / ((B - 1) * R) if estimator == "mean" else np.exp(log_probs_RB)


@settings(max_examples=150)
@given(
    arrays(np.float32, st.tuples(st.just(1), st.integers(1, 4), st.integers(2, 40)), elements=st.floats(-200, 200, width=32)),
    st.sampled_from(LOSSES),
    st.sampled_from(ESTIMATORS),
)
def test_bucket_scores_are_right_to_float32_rounding(logits_NRB, loss, estimator):
    expected_RB = truth(logits_NRB[0], loss, estimator)
    found_NRB = bucket_scores(logits_NRB.copy(), loss=loss, estimator=estimator)
    assert np.isfinite(found_NRB).all()
    rtol, atol = (1e-6, 1e-37) if estimator in ("min", "median") else (4e-7, 2e-5 if loss == "softmax" else 1e-37)
    if estimator == "mean":
        atol = 4e-7
    if loss == "softmax":
        rtol += abs(logits_NRB).max() * 1.2e-7  # the rounding of z - max z, which float32 cannot hold better
    np.testing.assert_allclose(found_NRB[0], expected_RB, rtol=rtol, atol=atol)


@pytest.mark.parametrize("loss", ["logistic", "squared-hinge"])
@pytest.mark.parametrize("estimator", ["min", "log-probs"])
def test_sigmoids_are_right_over_their_whole_range(loss, estimator):
    logits_NRB = np.linspace(-86, 86, 200_001, dtype=np.float32).reshape(1, 1, -1)
    expected_RB = truth(logits_NRB[0], loss, estimator)
    found_NRB = bucket_scores(logits_NRB, loss=loss, estimator=estimator)
    np.testing.assert_allclose(found_NRB[0], expected_RB, rtol=3.6e-7)  # 3 units in the last place


def test_work_is_done_in_place_and_softmax_sums_to_one():
    logits_NRB = np.random.default_rng(0).normal(0, 5, (9, 3, 1000)).astype(np.float32)
    found_NRB = bucket_scores(logits_NRB, loss="softmax", estimator="min")
    assert found_NRB is logits_NRB
    np.testing.assert_allclose(found_NRB.sum(axis=2, dtype=np.float64), 1, rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_extreme_outputs_stay_finite(loss, estimator):
    logits_NRB = np.array([[[-9e29, 9e29, 0.0], [9e29, 9e29, 9e29], [-9e29, -9e29, -9e29]]], np.float32)
    assert np.isfinite(bucket_scores(logits_NRB, loss=loss, estimator=estimator)).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -3e38])
@pytest.mark.parametrize(("loss", "estimator"), [("logistic", "logits"), ("logistic", "mean"), ("softmax", "log-probs")])
def test_an_output_that_is_no_number_is_named(value, loss, estimator):
    logits_NRB = np.zeros((5, 4, 30), np.float32)
    logits_NRB[3, 2, 29] = logits_NRB[3, 3, 0] = logits_NRB[4, 0, 0] = value
    with pytest.raises(ConfigError, match=r"sample 3, repetition 2: .* not a finite number below 1e\+30; train or copy"):
        bucket_scores(logits_NRB, loss=loss, estimator=estimator)


@pytest.mark.parametrize(
    ("array", "reason"),
    [
        (np.zeros((2, 3, 4)), r"got float64 \(2, 3, 4\)"),
        (np.zeros((2, 3), np.float32), r"got float32 \(2, 3\)"),
        (np.zeros((2, 3, 4), np.float32)[:, :, ::2], "not contiguous"),
        (np.frombuffer(bytes(24), np.float32).reshape(1, 2, 3), "read-only"),
    ],
)
def test_another_kind_of_array_is_refused(array, reason):
    with pytest.raises(
        ConfigError, match=r"must be a writable C-contiguous float32 array \(N, R, B\), " + reason.join([".*"] * 2)
    ):
        bucket_scores(array, loss="logistic", estimator="mean")


@pytest.mark.parametrize("n_threads", [1, 3, 16])
def test_no_samples_are_no_scores(n_threads):
    assert bucket_scores(np.zeros((0, 2, 3), np.float32), loss="softmax", estimator="mean", n_threads=n_threads).shape == (
        0,
        2,
        3,
    )
