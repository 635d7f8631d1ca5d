"""The second stage against slow references: its weights, its margins and the order it gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from mach.data import CSR
from mach.decoding import TopK
from mach.decoding.rerank import Reranker, SparseWeights, best_of, fit, fit_margins, fit_prototypes, ndcg, prototypes
from mach.decoding.rerank.fit import UNSEEN, blocks
from mach.errors import ConfigError
from mach.kernels import bits_of, float_of

N, F, K, M = 60, 25, 12, 5


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    X = sp.random(N, F, 0.3, random_state=4, dtype=np.float32, data_rvs=lambda n: rng.normal(size=n).astype(np.float32))
    truth = rng.random((N, K)) < 0.2
    truth[:, 7] = False  # a label that nobody has
    listed = np.stack([rng.permutation(K)[:M] for _ in range(N)])
    return CSR.from_scipy(X), CSR.from_scipy(truth.astype(np.float32), with_values=False), truth, listed


def scaled(features: CSR) -> np.ndarray:
    X = features.to_scipy().toarray().astype(np.float64)
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    return np.divide(X, lengths, out=np.zeros_like(X), where=lengths > 0)


def dense(found: SparseWeights) -> np.ndarray:
    """Give the weights as (K, F) float64."""
    W = np.zeros((len(found.bias), found.n_features))
    for k, (a, b) in enumerate(zip(found.indptr, found.indptr[1:], strict=False)):
        W[k, found.features[a:b]] = [float_of(bits) for bits in found.values[a:b]]
    return W


def fitted(features, labels, parts, *, cost=1.0, **how):
    return fit_margins(features, labels, lambda: parts, costs=(cost,), **how)[0]


def same(one: SparseWeights, other: SparseWeights) -> bool:
    return Reranker(one, 4, 1.5).key == Reranker(other, 4, 1.5).key


@pytest.mark.parametrize("costs", [(0.05, 0.2, 2.0), (0.2,), (2.0, 0.05)])
def test_each_label_is_solved_as_a_linear_svm_for_each_cost(data, monkeypatch, costs):
    features, labels, _, listed = data
    monkeypatch.setattr(fit, "SMALLEST", 1e-12)
    monkeypatch.setattr(fit, "PASSES", 50)
    found = fit_margins(features, labels, lambda: [(np.arange(N), listed)], costs=costs)
    assert len(found) == len(costs)
    for cost, weights in zip(costs, found, strict=True):
        check_solved(data, weights, cost)


def check_solved(data, found: SparseWeights, cost: float) -> None:
    features, _, truth, listed = data
    W, X = dense(found), scaled(features)

    def loss(w, b, rows, y):
        return (w @ w + b * b) / 2 + cost * np.square(np.maximum(0, 1 - y * (X[rows] @ w + b))).sum()

    for k in range(K):
        rows = np.flatnonzero(truth[:, k] | (listed == k).any(1))  # its positives, and who lists it
        if k == 7:
            assert found.bias[k] == UNSEEN and not W[k].any()
            continue
        y = np.where(truth[rows, k], 1.0, -1.0)
        best = LinearSVC(C=cost, tol=1e-8, max_iter=100_000, dual=True).fit(X[rows], y)
        least = loss(best.coef_[0], best.intercept_[0], rows, y)
        assert loss(W[k], found.bias[k], rows, y) <= 1.02 * least  # to the tolerance, and the rounding to bfloat16


def test_weights_near_zero_are_dropped_and_the_rest_kept(data, monkeypatch):
    features, labels, _, listed = data
    every = fitted(features, labels, [(np.arange(N), listed)])
    monkeypatch.setattr(fit, "SMALLEST", 1e-12)
    whole = dense(fitted(features, labels, [(np.arange(N), listed)]))
    assert np.array_equal(dense(every), np.where(np.abs(whole) >= 0.05, whole, 0)) and (np.abs(whole) < 0.05).any()


def test_neither_blocks_nor_parts_nor_threads_nor_copies_matter(data, monkeypatch):
    features, labels, _, listed = data
    rows = np.arange(N)
    one = fitted(features, labels, [(rows, listed)])
    said = []
    for pairs, n_threads, copied in ((1, 1, 0), (40, 3, 200)):  # no label's samples, those of some labels
        monkeypatch.setattr(fit, "N_THREADS", n_threads)
        monkeypatch.setattr(fit, "COPIED", copied)
        parts = [(rows[:17], listed[:17]), (rows[17:], listed[17:])]
        other = fitted(features, labels, parts, pairs=pairs, progress=lambda done, total: said.append((done, total)))
        assert same(other, one)
    assert said[:K] == [(k + 1, K) for k in range(K)] and said[-1] == (K, K)


def test_samples_in_no_shortlist_are_not_trained_on(data):
    features, labels, truth, listed = data
    some = np.flatnonzero(np.arange(N) % 3)
    part = fitted(features, labels, [(some, listed[some])])
    X = CSR.from_scipy(features.to_scipy()[some])
    Y = CSR.from_scipy(truth[some].astype(np.float32), with_values=False)
    assert same(part, fitted(X, Y, [(np.arange(len(some)), listed[some])]))


def test_a_place_of_a_shortlist_may_be_empty(data):
    features, labels, _, listed = data
    empty = np.full((N, 1), -1)
    with_empty = fitted(features, labels, [(np.arange(N), np.concatenate([empty, listed, empty], 1))])
    assert same(with_empty, fitted(features, labels, [(np.arange(N), listed)]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 20))
def test_blocks_cover_the_labels_within_the_limit(counts, pairs):
    cuts = blocks(np.array(counts), pairs)
    assert [low for low, _ in cuts] == [0, *(high for _, high in cuts[:-1])] and cuts[-1][1] == len(counts)
    assert all(sum(counts[low:high]) <= pairs or high == low + 1 for low, high in cuts)


def made(rng: np.random.Generator) -> SparseWeights:
    W = sp.random(K, F, 0.4, random_state=int(rng.integers(1000)), format="csr", dtype=np.float32)
    values = np.array([bits_of(np.float32(x)) for x in W.data], np.uint16)
    bias = rng.normal(size=K).astype(np.float32)
    return SparseWeights(W.indptr.astype(np.int64), W.indices.astype(np.int32), values, bias, F)


def test_margins_are_those_of_a_dense_product(data):
    features, rng = data[0], np.random.default_rng(0)
    found = made(rng)
    labels = rng.integers(0, K, (N, 6))
    expected = np.take_along_axis(scaled(features) @ dense(found).T + found.bias, labels, 1)
    assert np.allclose(found.margins(features, labels), expected, atol=1e-5)
    empty = CSR(np.zeros(2, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), F)
    assert np.array_equal(found.margins(empty, labels[:1]), found.bias[labels[:1]])
    with pytest.raises(ConfigError, match="the samples have 3 features, the second stage was fitted on 25"):
        found.margins(CSR(empty.indptr, empty.indices, empty.values, 3), labels[:1])


@pytest.mark.parametrize("n_own", [0, 1, 5, 20, 21, 60])
def test_long_rows_of_weights_give_the_same_bits_as_short_ones(n_own):
    """160 weights a label: sought from 20 features of a sample down, all visited above that."""
    rng, width = np.random.default_rng(n_own), 200
    W = np.stack([np.sort(rng.choice(width, 160, replace=False)) for _ in range(3)])
    bits = rng.integers(0x3C00, 0x4100, W.size).astype(np.uint16) | (rng.integers(0, 2, W.size) << 15).astype(np.uint16)
    found = SparseWeights(np.arange(4) * 160, W.ravel().astype(np.int32), bits, np.zeros(3, np.float32), width)
    own = np.sort(rng.choice(width, n_own, replace=False)).astype(np.int32)
    values = rng.normal(size=n_own).astype(np.float32)
    margins = found.margins(CSR(np.array([0, n_own]), own, values, width), np.arange(3)[None])[0]
    square, held = np.float32(0), dict(zip(own.tolist(), values, strict=True))
    for value in values:
        square += value * value
    for label in range(3):
        total = np.float32(0)
        for feature, each in zip(W[label].tolist(), bits[160 * label :], strict=False):
            total += np.float32(float_of(each)) * held.get(feature, np.float32(0))
        assert margins[label] == total * (np.float32(1) / np.sqrt(square) if n_own else 0)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_the_order_is_that_of_the_sums(seed, depth, k, has_ties):
    rng = np.random.default_rng(seed)
    found = made(rng)
    X = sp.random(9, F, 0.3, random_state=seed % 1000, format="csr", dtype=np.float32)
    features = CSR.from_scipy(X)
    n = max(k, min(depth, K))
    labels = np.stack([rng.permutation(K)[:n] for _ in range(9)])
    scores = -np.sort(-rng.normal(size=(9, n)).round(0 if has_ties else 9), axis=1).astype(np.float32)
    if has_ties:
        found = dataclasses.replace(found, bias=np.zeros(K, np.float32), indptr=np.zeros(K + 1, np.int64))
    top = Reranker(found, depth, 1.5).rerank(features, TopK(labels, scores), k, 3)
    margins = found.margins(features, labels)
    for i in range(9):
        first = sorted(
            ((float(scores[i, j]) + 4.5 * float(margins[i, j]), labels[i, j]) for j in range(min(depth, n))),
            key=lambda item: (-item[0], item[1]),
        )
        found_labels, expected = top.labels[i].tolist(), [label for _, label in first] + list(labels[i, depth:])
        gaps = -np.diff([total for total, _ in first])
        if not ((gaps > 0) & (gaps < 1e-5)).any():  # else float32 may turn two round
            assert found_labels == expected[:k]
        assert set(found_labels[depth:]) == set(expected[depth:k])
        assert (np.diff(top.scores[i]) <= 0).all()
        later = top.scores[i, depth:]
        assert np.allclose(np.diff(later), np.diff(scores[i, depth:k]), atol=1e-4)


def test_a_prototype_is_the_direction_of_the_sum_of_a_labels_samples(data, monkeypatch):
    features, labels, truth, _ = data
    monkeypatch.setattr(prototypes, "SMALLEST", 1e-12)
    used = np.arange(N) % 7 != 3
    sums = (truth * used[:, None]).T.astype(np.float64) @ scaled(features)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    directions = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)
    found, counts = fit_prototypes(features, labels, used)
    assert np.allclose(dense(found), directions, rtol=4e-3, atol=1e-9) and not found.bias.any()
    assert counts.tolist() == (truth * used[:, None]).sum(0).tolist() and counts[7] == 0
    asked = np.broadcast_to(np.arange(K), (N, K)).copy()
    assert np.allclose(found.margins(features, asked), scaled(features) @ directions.T, atol=4e-3)


def test_what_is_near_to_zero_is_not_kept_in_prototypes():
    rows = np.array([[1.0, 0.049, 0], [0, 0, 2.0]], np.float32)
    features, labels = CSR.from_scipy(rows), CSR.from_scipy(np.array([[1, 0, 0], [1, 0, 1.0]]), with_values=False)
    found, _ = fit_prototypes(features, labels, np.ones(2, bool))
    half = float_of(bits_of(np.float32(0.7071)))
    assert dense(found).tolist() == [[half, 0, half], [0, 0, 0], [0, 0, 1]]


@given(st.integers(0, 2**32 - 1), st.integers(1, 9))
def test_ndcg_is_that_of_its_definition(seed, k):
    rng = np.random.default_rng(seed)
    scores, right = rng.permutation(9 * k).reshape(9, k).astype(float), rng.random((9, k)) < 0.3
    n_true = right.sum(1) + rng.integers(0, 3, 9)
    found = ndcg(scores, right, n_true)
    for n in range(9):
        order = sorted(range(k), key=lambda i: -scores[n, i])[:5]
        gain = sum(right[n, i] / np.log2(place + 2) for place, i in enumerate(order))
        ideal = sum(1 / np.log2(place + 2) for place in range(min(max(n_true[n], 1), 5, k)))
        assert found[n] == pytest.approx(gain / ideal)


def test_the_first_way_is_kept_unless_another_is_clearly_better():
    usual = np.zeros(100)
    lucky, better = usual.copy(), usual.copy()
    lucky[:4] = 0.6, 0.6, 0.6, -0.6  # a lead of 0.012, with a standard error of 0.012
    better[:40] = 0.1
    assert best_of([usual]) == 0 and best_of([usual, lucky]) == 0
    assert best_of([usual, lucky, better]) == 2 and best_of([better, usual, lucky]) == 0
