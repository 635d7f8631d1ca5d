"""Metrics: by hand, against loops in plain Python, and fed in chunks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from sklearn.metrics import f1_score, label_ranking_average_precision_score

from mach import metrics
from mach.errors import ConfigError, DataError


def rows(truth, n_labels=20):
    """Turn a list of lists of label ids into CSR."""
    indptr = np.cumsum([0, *map(len, truth)])
    indices = np.array([label for row in truth for label in row], dtype=np.int32)
    return csr_matrix((np.ones(len(indices)), indices, indptr), shape=(len(truth), n_labels))


# The slow truth: sets and loops, as the papers write them.


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def slow_precision(labels, truth, k):
    return mean(sum(label in true for label in row[:k]) / k for row, true in zip(labels, truth, strict=True))


def slow_recall(labels, truth, k):
    return mean(sum(label in true for label in row[:k]) / max(len(true), 1) for row, true in zip(labels, truth, strict=True))


def slow_ideal(true, k):
    return sum(1 / math.log2(j + 1) for j in range(1, min(k, len(true)) + 1))


def slow_dcg(row, true, k, worth):
    return sum(worth(label) / math.log2(j + 1) for j, label in enumerate(row[:k], start=1) if label in true)


def slow_ndcg(labels, truth, k):
    return mean(slow_dcg(row, true, k, lambda _: 1) / (slow_ideal(true, k) or 1) for row, true in zip(labels, truth, strict=True))


def slow_map(labels, truth):
    total = 0.0
    for row, true in zip(labels, truth, strict=True):
        at_hits = [sum(x in true for x in row[: j + 1]) / (j + 1) for j, label in enumerate(row) if label in true]
        total += sum(at_hits) / (min(len(row), len(true)) or 1)
    return total / len(truth)


def slow_psp(labels, truth, propensity, k):
    above = sum(1 / propensity[x] for row, true in zip(labels, truth, strict=True) for x in row[:k] if x in true)
    below = sum(sum(sorted((1 / propensity[x] for x in true), reverse=True)[:k]) for true in truth)
    return above / below if below else 0.0


def slow_psndcg(labels, truth, propensity, k):
    above = below = 0.0
    for row, true in zip(labels, truth, strict=True):
        best = sorted(true, key=lambda x: propensity[x])
        above += slow_dcg(row, true, k, lambda x: 1 / propensity[x]) / (slow_ideal(true, k) or 1)
        below += slow_dcg(best, true, k, lambda x: 1 / propensity[x]) / (slow_ideal(true, k) or 1)
    return above / below if below else 0.0


def slow_f1(labels, scores, truth, threshold, n_labels):
    """Fill dense tables and let scikit-learn count."""
    true_NK, predicted_NK = np.zeros((2, len(truth), n_labels), dtype=int)
    for i, (row, true) in enumerate(zip(labels, truth, strict=True)):
        true_NK[i, true] = 1
        predicted_NK[i, [x for x, score in zip(row, scores[i], strict=True) if x >= 0 and score >= threshold]] = 1
    return [f1_score(true_NK, predicted_NK, average=average, zero_division=0) for average in ("micro", "macro")]


@st.composite
def problems(draw):
    """Draw (labels_Nk, truth as lists, propensities): some lists end early, some rows have no labels."""
    n_labels, n_samples = draw(st.integers(6, 20)), draw(st.integers(1, 9))
    k = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    labels_Nk = np.array([rng.permutation(n_labels)[:k] for _ in range(n_samples)])
    labels_Nk[np.arange(k) >= rng.integers(0, k + 3, size=n_samples)[:, None]] = -1
    truth = [sorted(rng.permutation(n_labels)[: rng.integers(0, 8)].tolist()) for _ in range(n_samples)]
    return labels_Nk, truth, rng.uniform(0.05, 1, size=n_labels)


# By hand


HAND = np.array([[3, 1, 0], [2, 3, -1], [4, 0, 1]])
HAND_TRUTH = [[0, 3], [], [0, 1, 2, 4, 5]]
LOG3 = math.log2(3)


def test_worked_example():
    truth = rows(HAND_TRUTH)  # hits: x.x | no labels | xxx
    assert metrics.precision_at_k(HAND, truth, 1) == pytest.approx((1 + 0 + 1) / 3)
    assert metrics.precision_at_k(HAND, truth, 3) == pytest.approx((2 / 3 + 0 + 1) / 3)
    assert metrics.recall_at_k(HAND, truth, 3) == pytest.approx((1 + 0 + 3 / 5) / 3)
    assert metrics.ndcg_at_k(HAND, truth, 3) == pytest.approx(((1 + 1 / 2) / (1 + 1 / LOG3) + 0 + 1) / 3)
    assert metrics.mean_average_precision(HAND, truth) == pytest.approx(((1 + 2 / 3) / 2 + 0 + 1) / 3)


def test_worked_example_with_propensities():
    propensity_K = np.array([1, 0.5, 0.1, 0.25, 0.5, 1])  # worth 1, 2, 10, 4, 2, 1
    truth = rows(HAND_TRUTH, 6)
    assert metrics.psp_at_k(HAND, truth, propensity_K, 1) == pytest.approx((4 + 2) / (4 + 10))
    assert metrics.psp_at_k(HAND, truth, propensity_K, 3) == pytest.approx((4 + 1 + 2 + 1 + 2) / (4 + 1 + 10 + 2 + 2))
    above = (4 + 1 / 2) / (1 + 1 / LOG3) + (2 + 1 / LOG3 + 2 / 2) / (1 + 1 / LOG3 + 1 / 2)
    below = (4 + 1 / LOG3) / (1 + 1 / LOG3) + (10 + 2 / LOG3 + 2 / 2) / (1 + 1 / LOG3 + 1 / 2)
    assert metrics.psndcg_at_k(HAND, truth, propensity_K, 3) == pytest.approx(above / below)


def test_worked_example_of_f1():
    scores_Nk = np.array([[0.9, 0.5, 0.4], [0.7, 0.2, 0.9], [0.8, 0.5, 0.5]])
    # predicted: 3 1 | 2 | 4 0 1 against 0 3 | none | 0 1 2 4 5: TP 3 4 0 1, FP 1 2, FN 0 2 5
    micro, macro = metrics.micro_macro_f1(HAND, scores_Nk, rows(HAND_TRUTH), threshold=0.5, n_labels=6)
    assert micro == pytest.approx(2 * 4 / (2 * 4 + 2 + 3))
    assert macro == pytest.approx((2 / 3 + 2 / 3 + 0 + 1 + 1 + 0) / 6)


def test_propensities_follow_the_formula():
    # N = 1000: log N - 1 = 5.907755; C = 5.907755 * 2.5**0.55 = 9.778889
    propensity_K = metrics.propensities(np.array([0, 1, 10, 1000]), 1000)
    c = (math.log(1000) - 1) * 2.5**0.55
    assert c == pytest.approx(9.778889, abs=1e-5)
    assert propensity_K == pytest.approx(
        [1 / (1 + c / 1.5**0.55), 1 / (1 + c / 2.5**0.55), 1 / (1 + c / 11.5**0.55), 1 / (1 + c / 1001.5**0.55)]
    )
    assert propensity_K[1] == pytest.approx(1 / math.log(1000))  # a label seen once, whatever a and b
    for a, b in metrics.PROPENSITY_AB.values():
        assert metrics.propensities(np.array([1]), 1000, a, b) == pytest.approx([1 / math.log(1000)])


# Against the loops


@given(problems())
def test_equals_the_loops(problem):
    labels_Nk, truth, propensity_K = problem
    labels, csr = labels_Nk.tolist(), rows(truth, len(propensity_K))
    for k in range(1, labels_Nk.shape[1] + 1):
        assert metrics.precision_at_k(labels_Nk, csr, k) == pytest.approx(slow_precision(labels, truth, k))
        assert metrics.recall_at_k(labels_Nk, csr, k) == pytest.approx(slow_recall(labels, truth, k))
        assert metrics.ndcg_at_k(labels_Nk, csr, k) == pytest.approx(slow_ndcg(labels, truth, k))
        assert metrics.psp_at_k(labels_Nk, csr, propensity_K, k) == pytest.approx(slow_psp(labels, truth, propensity_K, k))
        assert metrics.psndcg_at_k(labels_Nk, csr, propensity_K, k) == pytest.approx(slow_psndcg(labels, truth, propensity_K, k))
    assert metrics.mean_average_precision(labels_Nk, csr) == pytest.approx(slow_map(labels, truth))


@settings(max_examples=40)
@given(problems(), st.floats(0, 1))
def test_f1_equals_scikit_learn(problem, threshold):
    labels_Nk, truth, propensity_K = problem
    scores_Nk = -np.sort(-np.random.default_rng(0).random(labels_Nk.shape), axis=1)
    n_labels = len(propensity_K)
    fast = metrics.micro_macro_f1(labels_Nk, scores_Nk, rows(truth, n_labels), threshold=threshold, n_labels=n_labels)
    assert fast == pytest.approx(slow_f1(labels_Nk.tolist(), scores_Nk, truth, threshold, n_labels))


def test_map_of_whole_rankings_is_scikit_learns():
    rng = np.random.default_rng(1)
    scores_NK, true_NK = rng.random((50, 12)), rng.random((50, 12)) < 0.3
    true_NK[:, 0] |= ~true_NK.any(axis=1)
    ranked_NK = np.argsort(-scores_NK, axis=1)
    expected = label_ranking_average_precision_score(true_NK, scores_NK)
    assert metrics.mean_average_precision(ranked_NK, csr_matrix(true_NK)) == pytest.approx(expected)


@settings(max_examples=40)
@given(problems(), st.integers(1, 4))
def test_chunks_add_up_to_the_whole(problem, size):
    labels_Nk, truth, propensity_K = problem
    n_labels, k, csr = len(propensity_K), labels_Nk.shape[1], rows(truth, len(propensity_K))
    scores_Nk = np.random.default_rng(0).random(labels_Nk.shape)
    evaluator = metrics.Evaluator(n_labels, ks=(1, 3, 5), recall_ks=(2, 6), propensities=propensity_K, threshold=0.5)
    for start in range(0, len(truth), size):
        part = Slice(csr.indptr[start : start + size + 1], csr.indices)  # begins above 0
        evaluator.update(labels_Nk[start : start + size], scores_Nk[start : start + size], part)
    micro, macro = metrics.micro_macro_f1(labels_Nk, scores_Nk, csr, threshold=0.5, n_labels=n_labels)
    whole = {"MAP": metrics.mean_average_precision(labels_Nk, csr), "micro-F1": micro, "macro-F1": macro}
    for at in (1, 3, 5):
        if at <= k:
            whole[f"P@{at}"] = metrics.precision_at_k(labels_Nk, csr, at)
            whole[f"nDCG@{at}"] = metrics.ndcg_at_k(labels_Nk, csr, at)
            whole[f"PSP@{at}"] = metrics.psp_at_k(labels_Nk, csr, propensity_K, at)
            whole[f"PSnDCG@{at}"] = metrics.psndcg_at_k(labels_Nk, csr, propensity_K, at)
    whole |= {f"R@{at}": metrics.recall_at_k(labels_Nk, csr, at) for at in (2, 6) if at <= k}
    assert evaluator.result() == pytest.approx(whole)


class Slice:
    """CSR rows cut out of a larger matrix."""

    def __init__(self, indptr, indices):
        self.indptr, self.indices = indptr, indices


# Properties


@given(problems())
def test_the_best_lists_score_one(problem):
    _, truth, propensity_K = problem
    truth = [true for true in truth if true] or [[0]]
    best_Nk = np.full((len(truth), 8), -1)
    for row, true in zip(best_Nk, truth, strict=True):
        row[: len(true)] = sorted(true, key=lambda label: propensity_K[label])
    csr = rows(truth, len(propensity_K))
    evaluator = metrics.Evaluator(len(propensity_K), recall_ks=(8,), propensities=propensity_K)
    evaluator.update(best_Nk, None, csr)
    result = evaluator.result()
    assert [result[key] for key in result if not key.startswith("P@")] == pytest.approx([1.0] * 11)
    assert result["P@1"] == 1.0


def test_without_any_true_label_everything_is_zero():
    evaluator = metrics.Evaluator(5, ks=(1,), recall_ks=(2,), propensities=np.full(5, 0.5), threshold=2.0)
    evaluator.update(np.array([[0, 1]]), np.array([[0.5, 0.1]]), rows([[]], 5))
    keys = ["P@1", "nDCG@1", "R@2", "MAP", "PSP@1", "PSnDCG@1", "micro-F1", "macro-F1"]
    assert evaluator.result() == dict.fromkeys(keys, 0.0)


def test_smaller_types_and_read_only_arrays_will_do():
    labels_Nk, truth = HAND.astype(np.int16), rows(HAND_TRUTH)
    labels_Nk.flags.writeable = truth.indices.flags.writeable = truth.indptr.flags.writeable = False
    assert metrics.precision_at_k(labels_Nk, truth, 3) == metrics.precision_at_k(HAND, rows(HAND_TRUTH), 3)


# Errors


@pytest.mark.parametrize(
    ("labels", "truth", "text"),
    [
        ([0, 1], [[0]], r"labels_Nk must be integers of shape \(N, k\), got int64 of shape \(2,\)"),
        ([[0.5]], [[0]], r"labels_Nk must be integers of shape \(N, k\), got float64"),
        ([[0]], [[0], [1]], "1 rows of predictions against 2 rows of truth: give the same rows"),
        ([[-2]], [[0]], "predicted label id -2 is negative: only -1"),
        ([[0]], [[-1]], "true label id -1 is negative"),
        ([[0], [1]], [[0], [2, 1]], "row 1: the true label ids must rise strictly"),
        ([[0], [1]], [[0], [1, 1]], "row 1: the true label ids must rise strictly"),
        ([[0, 1], [1, 1]], [[0], [1]], "row 1: a true label is predicted twice"),
        ([[20]], [[0]], r"predicted label id 20 is outside \[0, 20\): are these of another data set\?"),
        ([[0]], [[20]], r"true label id 20 is outside \[0, 20\)"),
    ],
)
def test_bad_rows_are_named(labels, truth, text):
    csr = Slice(np.cumsum([0, *map(len, truth)]), np.array([label for row in truth for label in row]))
    with pytest.raises(DataError, match=text):
        metrics.Evaluator(20).update(np.array(labels), None, csr)


def test_lists_of_another_length_are_refused():
    evaluator = metrics.Evaluator(20)
    evaluator.update(np.array([[0, 1]]), None, rows([[0]]))
    with pytest.raises(DataError, match="lists of 1 labels after lists of 2: pad the shorter with -1"):
        evaluator.update(np.array([[0]]), None, rows([[0]]))


@pytest.mark.parametrize("scores", [None, np.zeros((1, 3))])
def test_f1_without_fitting_scores_is_refused(scores):
    with pytest.raises(DataError, match=r"F1 at a threshold needs scores of shape \(1, 2\), got \("):
        metrics.micro_macro_f1(np.array([[0, 1]]), scores, rows([[0]]), threshold=0.5, n_labels=20)


def test_nothing_to_evaluate_is_named():
    with pytest.raises(DataError, match="there are no rows to evaluate"):
        metrics.Evaluator(5).result()
    with pytest.raises(DataError, match="there are no rows to evaluate"):
        metrics.precision_at_k(np.zeros((0, 3), dtype=np.int64), rows([]), 1)


@pytest.mark.parametrize(
    ("k", "text"), [(0, "k=0 must be a whole number of at least 1"), (4, "k=4 exceeds the 3 labels a row of these predictions")]
)
def test_bad_k_is_named(k, text):
    with pytest.raises(ConfigError, match=text):
        metrics.precision_at_k(HAND, rows(HAND_TRUTH), k)
    with pytest.raises(ConfigError, match=text):
        metrics.psp_at_k(HAND, rows(HAND_TRUTH), np.ones(20), k)


def test_bad_settings_of_the_evaluator_are_named():
    with pytest.raises(ConfigError, match=r"k=1\.5 must be a whole number of at least 1"):
        metrics.Evaluator(5, recall_ks=(1.5,))
    with pytest.raises(ConfigError, match="4 propensities for 5 labels: give one a label"):
        metrics.Evaluator(5, propensities=np.ones(4))
    with pytest.raises(ConfigError, match=r"propensities must lie in \(0, 1\]: are these their inverses\?"):
        metrics.Evaluator(2, propensities=np.array([0.5, 2.0]))


def test_a_label_without_propensity_is_named():
    with pytest.raises(DataError, match="label id 5 has no propensity: there are 5, one a label"):
        metrics.psp_at_k(HAND, rows(HAND_TRUTH), np.ones(5), 1)


@pytest.mark.parametrize(
    ("counts", "n_samples", "a", "error", "text"),
    [
        ([1], 2, 0.5, DataError, "at least 3 training samples, got 2"),
        ([1, 9], 8, 0.5, DataError, r"label counts must lie in \[0, 8\]"),
        ([-1], 8, 0.5, DataError, r"label counts must lie in \[0, 8\]"),
        ([1], 8, 0.0, ConfigError, r"propensity a=0\.0 and b=1\.5 must be positive"),
    ],
)
def test_bad_input_of_propensities_is_named(counts, n_samples, a, error, text):
    with pytest.raises(error, match=text):
        metrics.propensities(np.array(counts), n_samples, a)
