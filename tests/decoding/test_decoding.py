"""The whole decode, from raw head outputs, against the reference in float64 loops."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Estimator, Loss
from mach.decoding import decode_topk, reference
from mach.errors import ConfigError
from mach.hashing.table import LabelTable

LOSSES = Loss.__args__
ESTIMATORS = Estimator.__args__
EPS = np.finfo(np.float32).eps


def logits_of(rng, n_samples, table, scale=3.0):
    return rng.normal(0, scale, (n_samples, table.n_repetitions, table.n_buckets)).astype(np.float32)


def agrees(found, logits_RB, table, *, loss, estimator):
    """Assert scores right to float32 rounding, in order, and no label left out that is clearly better than the last one kept."""
    R, B, k = table.n_repetitions, table.n_buckets, len(found.labels[0])
    how = {"loss": loss, "estimator": estimator, "is_identity": table.is_identity}
    truth_K = np.array(reference.label_scores(logits_RB.tolist(), table.array().tolist(), **how))
    top = max(1.0, abs(truth_K).max(), R * abs(logits_RB).max() if estimator in ("logits", "log-probs") else 0)
    error = 4 * EPS * top * (np.log2(R) + 4) * (B / (B - 1) if estimator == "mean" else 1)
    labels_k, scores_k = found.labels[0], found.scores[0]
    assert len(set(labels_k.tolist())) == k
    np.testing.assert_allclose(scores_k, truth_K[labels_k], rtol=0, atol=error)
    order = list(zip(-scores_k, labels_k, strict=True))
    assert order == sorted(order)
    left_out = np.setdiff1d(np.arange(table.n_labels), labels_k)
    assert not left_out.size or truth_K[left_out].max() <= scores_k[-1] + error


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("n_buckets", [200, 300, 70_000])  # held as uint8, uint16, uint32
def test_every_estimator_loss_and_table_width_agrees_with_the_reference(loss, estimator, n_buckets):
    table = LabelTable.hashed(max(n_buckets, 500), n_buckets, 3, seed=1)
    logits_NRB = logits_of(np.random.default_rng(7), 2, table)
    found = decode_topk(logits_NRB.copy(), table, 9, loss=loss, estimator=estimator)
    one = type(found)(found.labels[1:], found.scores[1:])
    agrees(one, logits_NRB[1], table, loss=loss, estimator=estimator)


@settings(max_examples=120)
@given(
    st.integers(2, 60), st.integers(2, 40), st.integers(1, 32), st.integers(1, 60), st.integers(0, 2**32),
    st.sampled_from(LOSSES), st.sampled_from(ESTIMATORS), st.sampled_from([0.01, 3.0, 80.0]),
)  # fmt: skip
def test_any_sizes_agree_with_the_reference(n_labels, n_buckets, n_repetitions, k, seed, loss, estimator, scale):
    table = LabelTable.hashed(n_labels, min(n_buckets, n_labels), n_repetitions, seed=seed)
    logits_NRB = logits_of(np.random.default_rng(seed), 1, table, scale)
    found = decode_topk(logits_NRB.copy(), table, min(k, n_labels), loss=loss, estimator=estimator)
    agrees(found, logits_NRB[0], table, loss=loss, estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
def test_identity_agrees_with_the_reference(loss, estimator):
    table = LabelTable.identity(300)
    logits_NRB = logits_of(np.random.default_rng(3), 1, table)
    found = decode_topk(logits_NRB.copy(), table, 300, loss=loss, estimator=estimator)
    agrees(found, logits_NRB[0], table, loss=loss, estimator=estimator)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_planted_labels_come_first(estimator):
    """Each sample's true labels light up their buckets a little: over 16 repetitions nothing else lights up as often."""
    rng, table = np.random.default_rng(5), LabelTable.hashed(20_000, 500, 16, seed=2)
    truth_N3 = np.array([rng.choice(20_000, 3, replace=False) for _ in range(20)])
    logits_NRB = rng.normal(-4, 0.5, (20, 16, 500)).astype(np.float32)
    for n, r in np.ndindex(20, 16):
        logits_NRB[n, r, table.array()[r, truth_N3[n]]] = rng.normal(1, 0.5, 3)
    found = decode_topk(logits_NRB, table, 3, loss="logistic", estimator=estimator)
    assert np.array_equal(np.sort(found.labels), np.sort(truth_N3))


@given(st.integers(1, 8), st.integers(2, 30), st.integers(0, 99), st.sampled_from(LOSSES))
def test_sure_and_right_scores_one_and_nothing_scores_more(n_repetitions, n_buckets, seed, loss):
    table = LabelTable.hashed(30, n_buckets, n_repetitions, seed=seed)
    label = seed % 30
    logits_NRB = np.full((1, n_repetitions, n_buckets), -200.0, dtype=np.float32)
    logits_NRB[0, np.arange(n_repetitions), table.array()[:, label]] = 200.0
    found = decode_topk(logits_NRB, table, 30, loss=loss, estimator="mean")
    assert found.scores[0, found.labels[0].tolist().index(label)] == pytest.approx(1.0, abs=1e-5)
    assert found.scores.max() <= 1.0 + 1e-5


def test_nothing_of_samples_times_labels_is_held():
    table = LabelTable.hashed(200_000, 1000, 2)
    table.array()
    logits_NRB = logits_of(np.random.default_rng(0), 64, table)
    decode_topk(logits_NRB[:1].copy(), table, 5, loss="logistic", estimator="mean")  # compiled
    tracemalloc.start()
    try:
        decode_topk(logits_NRB, table, 5, loss="logistic", estimator="mean", n_threads=2)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 24 << 20  # (N, K) float32 would be 49 MiB; a search reserves 10 MiB a thread, touching little of it


@pytest.mark.parametrize("k", [0, -1, 51])
def test_k_out_of_range_is_named(k):
    table = LabelTable.hashed(50, 10, 2)
    with pytest.raises(ConfigError, match=rf"k={k} must lie in \[1, 50\], the number of labels"):
        decode_topk(np.zeros((1, 2, 10), np.float32), table, k, loss="logistic", estimator="mean")


@pytest.mark.parametrize("shape", [(1, 3, 10), (1, 2, 11), (2, 10)])
def test_outputs_that_do_not_fit_the_table_are_named(shape):
    table = LabelTable.hashed(50, 10, 2)
    with pytest.raises(ConfigError, match=r"head outputs of shape \(.*\) do not fit the table: they must be \(N, 2, 10\)"):
        decode_topk(np.zeros(shape, np.float32), table, 1, loss="logistic", estimator="mean")


def test_a_broken_repetition_is_named_by_its_number_not_its_row():
    table = LabelTable.hashed(50, 10, repetitions=[8, 9, 10])
    logits_NRB = np.zeros((4, 3, 10), np.float32)
    logits_NRB[2, 1, 7] = np.nan
    with pytest.raises(ConfigError, match="sample 2, repetition 9: the head gave an output that is not a finite number"):
        decode_topk(logits_NRB, table, 5, loss="softmax", estimator="min")
