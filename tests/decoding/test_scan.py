"""The scan and the plain top-k, with scores that are small integers: float32 adds them exactly, so equality is exact."""

from __future__ import annotations

import statistics
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Estimator
from mach.decoding import reference
from mach.decoding.scan import scan_topk, score_labels
from mach.decoding.topk import BLOCK, TopK, topk_identity
from mach.errors import ConfigError

ESTIMATORS = Estimator.__args__
AGGREGATE = {"mean": sum, "logits": sum, "log-probs": sum, "min": min, "median": statistics.median}


def integer_problem(seed, n_samples, n_repetitions, n_buckets, n_labels, dtype, spread=4):
    rng = np.random.default_rng(seed)
    scores_NRB = rng.integers(-spread, spread + 1, (n_samples, n_repetitions, n_buckets)).astype(np.float32)
    return scores_NRB, rng.integers(n_buckets, size=(n_repetitions, n_labels)).astype(dtype)


def all_scores(scores_RB, table_RK, estimator):
    rows = [[float(scores_RB[r][b]) for b in table_RK[r]] for r in range(len(table_RK))]
    return [AGGREGATE[estimator](column) for column in zip(*rows, strict=True)]


def assert_same(found: TopK, labels_Nk, scores_Nk):
    assert (found.labels.dtype, found.scores.dtype) == (np.int64, np.float32)
    assert np.array_equal(found.labels, labels_Nk)
    assert np.array_equal(found.scores, scores_Nk)


@settings(max_examples=150)
@given(
    st.integers(0, 2**32), st.integers(1, 18), st.integers(1, 32), st.integers(2, 200), st.integers(2, 300), st.integers(1, 300),
    st.sampled_from([np.uint8, np.uint16, np.uint32]), st.sampled_from(ESTIMATORS), st.integers(1, 5),
)  # fmt: skip
def test_labels_and_ties_are_exact(seed, n_samples, n_repetitions, n_buckets, n_labels, k, dtype, estimator, n_threads):
    scores_NRB, table_RK = integer_problem(seed, n_samples, n_repetitions, n_buckets, n_labels, dtype)
    k = min(k, n_labels)
    found = scan_topk(scores_NRB, table_RK, k, estimator=estimator, n_threads=n_threads)
    truth_NK = [all_scores(scores_RB, table_RK, estimator) for scores_RB in scores_NRB[:2]]
    labels_Nk = [reference.topk(truth_K, k) for truth_K in truth_NK]
    first = TopK(found.labels[:2], found.scores[:2])
    assert_same(first, labels_Nk, [[truth_K[label] for label in row] for truth_K, row in zip(truth_NK, labels_Nk, strict=True)])
    assert np.array_equal(score_labels(scores_NRB, table_RK, found.labels, estimator=estimator), found.scores)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [1, 7, 1000])
def test_threads_and_parts_do_not_change_a_bit(estimator, k):
    rng = np.random.default_rng(1)
    table_RK = rng.integers(50, size=(5, 3 * BLOCK + 17)).astype(np.uint8)
    scores_NRB = rng.normal(size=(9, 5, 50)).round(1).astype(np.float32)  # rounded: sums tie often, but not in every order of r
    one = scan_topk(scores_NRB, table_RK, k, estimator=estimator, n_threads=1)
    for n_threads in (2, 3, 7, 64):
        many = scan_topk(scores_NRB, table_RK, k, estimator=estimator, n_threads=n_threads)
        assert_same(many, one.labels, one.scores)
    assert np.array_equal(score_labels(scores_NRB, table_RK, one.labels, estimator=estimator), one.scores)
    alone = scan_topk(scores_NRB[8:], table_RK, k, estimator=estimator)
    assert_same(alone, one.labels[8:], one.scores[8:])


def test_the_sum_runs_over_r_in_order_in_float32():
    scores_NRB = np.array([[[1e8, 0], [1, 0], [-1e8, 0], [1, 0]]], np.float32)  # in order 1, backwards 0, in float64 2
    found = scan_topk(scores_NRB, np.zeros((4, 2), np.uint8), 1, estimator="logits")
    assert found.scores.tolist() == [[1.0]]


@settings(max_examples=60)
@given(st.integers(0, 2**32), st.integers(1, 20), st.integers(1, 3 * BLOCK), st.integers(1, 1000), st.integers(1, 5))
def test_plain_topk_is_exact_and_equals_the_scan_of_the_identity(seed, n_samples, n_labels, k, n_threads):
    k = min(k, n_labels)
    scores_NK = np.random.default_rng(seed).integers(-30, 31, (n_samples, n_labels)).astype(np.float32)
    found = topk_identity(scores_NK, k, n_threads=n_threads)
    labels_Nk = np.argsort(-scores_NK, axis=1, kind="stable")[:, :k]
    assert_same(found, labels_Nk, np.take_along_axis(scores_NK, labels_Nk, axis=1))
    scanned = scan_topk(scores_NK[:, None], np.arange(n_labels, dtype=np.uint32)[None], k, estimator="median")
    assert_same(scanned, found.labels, found.scores)


@pytest.mark.parametrize("order", [1, -1])
def test_rising_and_falling_scores(order):
    scores_NK = np.arange(2 * BLOCK + 5, dtype=np.float32)[None, ::order]
    labels = np.arange(2 * BLOCK + 5)[::-order][:300]
    assert_same(topk_identity(scores_NK, 300, n_threads=2), labels[None], scores_NK[:, labels])


def test_equal_scores_give_the_first_labels():
    found = scan_topk(np.zeros((3, 4, 5), np.float32), np.zeros((4, 3 * BLOCK), np.uint8), 1000, estimator="logits", n_threads=3)
    assert_same(found, np.tile(np.arange(1000), (3, 1)), np.zeros((3, 1000)))


def test_no_samples():
    assert scan_topk(np.zeros((0, 4, 5), np.float32), np.zeros((4, 9), np.uint8), 3, estimator="mean").labels.shape == (0, 3)
    assert topk_identity(np.zeros((0, 9), np.float32), 3).scores.shape == (0, 3)


def test_two_callers_at_once():
    scores_NRB, table_RK = integer_problem(0, 8, 3, 50, 5000, np.uint16, spread=50)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: scan_topk(scores_NRB[n : n + 1], table_RK, 20, estimator="min"), range(8)))
    together = scan_topk(scores_NRB, table_RK, 20, estimator="min")
    assert np.array_equal(np.concatenate([f.labels for f in found]), together.labels)


@pytest.mark.parametrize("search", [lambda s, t, k: scan_topk(s, t, k, estimator="mean"), lambda s, t, k: topk_identity(s[0], k)])
@pytest.mark.parametrize("k", [0, 10])
def test_k_out_of_range_is_named(search, k):
    with pytest.raises(ConfigError, match=rf"k={k} must lie in \[1, 9\], the number of labels"):
        search(np.zeros((1, 4, 9), np.float32), np.zeros((4, 9), np.uint8), k)


def test_other_repetitions_than_the_table_are_named():
    scores_NRB, table_RK = np.zeros((1, 3, 5), np.float32), np.zeros((4, 9), np.uint8)
    with pytest.raises(ConfigError, match="the scores hold 3 repetitions, the table 4: select the same of both"):
        scan_topk(scores_NRB, table_RK, 2, estimator="mean")
    with pytest.raises(ConfigError, match="the scores hold 3 repetitions, the table 4: select the same of both"):
        score_labels(scores_NRB, table_RK, np.zeros((1, 1), np.int64), estimator="mean")


@pytest.mark.parametrize("label", [-1, 9])
def test_a_candidate_out_of_range_is_named(label):
    with pytest.raises(ConfigError, match=r"labels must lie in \[0, 9\), got"):
        score_labels(np.zeros((1, 4, 5), np.float32), np.zeros((4, 9), np.uint8), np.array([[0, label]]), estimator="mean")
