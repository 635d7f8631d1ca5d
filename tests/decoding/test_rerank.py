"""The second stage against slow references: its weights, its margins and the order it gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.svm import LinearSVC

from mach.data import CSR
from mach.decoding import TopK
from mach.decoding.rerank import (
    DEFAULT_WEIGHT,
    Reranker,
    add_prototypes,
    best_mix,
    fit,
    fit_prototypes,
    fit_reranker,
    prototypes,
)
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


def dense(found: Reranker) -> np.ndarray:
    """Give the weights as (K, F) float64."""
    W = np.zeros((len(found.bias), found.n_features))
    for k, (a, b) in enumerate(zip(found.indptr, found.indptr[1:], strict=False)):
        W[k, found.features[a:b]] = [float_of(bits) for bits in found.values[a:b]]
    return W


def fitted(features, labels, parts, *, cost=1.0, **how):
    return fit_reranker(features, labels, lambda: parts, cost=cost, depth=4, weight=1.5, **how)


@pytest.mark.parametrize("cost", [0.05, 0.2, 2.0])
def test_each_label_is_solved_as_a_linear_svm(data, monkeypatch, cost):
    features, labels, truth, listed = data
    monkeypatch.setattr(fit, "SMALLEST", 1e-12)
    found = fitted(features, labels, [(np.arange(N), listed)], cost=cost)
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


def test_neither_blocks_nor_parts_nor_threads_matter(data, monkeypatch):
    features, labels, _, listed = data
    rows = np.arange(N)
    one = fitted(features, labels, [(rows, listed)])
    said = []
    for pairs, n_threads in ((1, 1), (40, 3)):
        monkeypatch.setattr(fit, "N_THREADS", n_threads)
        parts = [(rows[:17], listed[:17]), (rows[17:], listed[17:])]
        other = fitted(features, labels, parts, pairs=pairs, progress=lambda done, total: said.append((done, total)))
        assert other.key == one.key
    assert said[:K] == [(k + 1, K) for k in range(K)] and said[-1] == (K, K)


def test_samples_in_no_shortlist_are_not_trained_on(data):
    features, labels, truth, listed = data
    some = np.flatnonzero(np.arange(N) % 3)
    part = fitted(features, labels, [(some, listed[some])])
    X = CSR.from_scipy(features.to_scipy()[some])
    Y = CSR.from_scipy(truth[some].astype(np.float32), with_values=False)
    assert part.key == fitted(X, Y, [(np.arange(len(some)), listed[some])]).key


@given(st.lists(st.integers(0, 9), min_size=1, max_size=30), st.integers(1, 20))
def test_blocks_cover_the_labels_within_the_limit(counts, pairs):
    cuts = blocks(np.array(counts), pairs)
    assert [low for low, _ in cuts] == [0, *(high for _, high in cuts[:-1])] and cuts[-1][1] == len(counts)
    assert all(sum(counts[low:high]) <= pairs or high == low + 1 for low, high in cuts)


def made(rng: np.random.Generator, *, depth: int = 4, weight: float = 1.5) -> Reranker:
    W = sp.random(K, F, 0.4, random_state=int(rng.integers(1000)), format="csr", dtype=np.float32)
    values = np.array([bits_of(np.float32(x)) for x in W.data], np.uint16)
    bias = rng.normal(size=K).astype(np.float32)
    return Reranker(W.indptr.astype(np.int64), W.indices.astype(np.int32), values, bias, F, depth, weight)


def test_margins_are_those_of_a_dense_product(data):
    features, rng = data[0], np.random.default_rng(0)
    found = made(rng)
    labels = rng.integers(0, K, (N, 6))
    expected = np.take_along_axis(scaled(features) @ dense(found).T + found.bias, labels, 1)
    assert np.allclose(found.margins(features, labels), expected, atol=1e-5)
    empty = CSR(np.zeros(2, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), F)
    assert np.array_equal(found.margins(empty, labels[:1]), found.bias[labels[:1]])
    with pytest.raises(ConfigError, match="the samples have 3 features, the re-ranker was fitted on 25"):
        found.margins(CSR(empty.indptr, empty.indices, empty.values, 3), labels[:1])


@pytest.mark.parametrize("n_own", [0, 1, 5, 20, 21, 60])
def test_long_rows_of_weights_give_the_same_bits_as_short_ones(n_own):
    """160 weights a label: sought from 20 features of a sample down, all visited above that."""
    rng, width = np.random.default_rng(n_own), 200
    W = np.stack([np.sort(rng.choice(width, 160, replace=False)) for _ in range(3)])
    bits = rng.integers(0x3C00, 0x4100, W.size).astype(np.uint16) | (rng.integers(0, 2, W.size) << 15).astype(np.uint16)
    found = Reranker(np.arange(4) * 160, W.ravel().astype(np.int32), bits, np.zeros(3, np.float32), width, 3, 1.0)
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


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12), st.booleans())
def test_the_order_is_that_of_the_sums(seed, depth, k, has_ties):
    rng = np.random.default_rng(seed)
    found = made(rng, depth=depth)
    X = sp.random(9, F, 0.3, random_state=seed % 1000, format="csr", dtype=np.float32)
    features = CSR.from_scipy(X)
    n = max(k, min(depth, K))
    labels = np.stack([rng.permutation(K)[:n] for _ in range(9)])
    scores = -np.sort(-rng.normal(size=(9, n)).round(0 if has_ties else 9), axis=1).astype(np.float32)
    if has_ties:
        found = dataclasses.replace(found, bias=np.zeros(K, np.float32), indptr=np.zeros(K + 1, np.int64))
    top = found.rerank(features, TopK(labels, scores), k, 3)
    margins = found.margins(features, labels)
    for i in range(9):
        first = [(-(float(scores[i, j]) + 4.5 * float(margins[i, j])), labels[i, j]) for j in range(min(depth, n))]
        expected = [label for _, label in sorted((round(s, 4), label) for s, label in first)] + list(labels[i, depth:])
        assert top.labels[i].tolist() == expected[:k]
        assert (np.diff(top.scores[i]) <= 0).all()
        later = top.scores[i, depth:]
        assert np.allclose(np.diff(later), np.diff(scores[i, depth:k]), atol=1e-4)


@pytest.mark.parametrize("share", [0.5, 3.0])
def test_a_share_of_the_prototypes_is_added_to_the_weights(data, monkeypatch, share):
    features, labels, truth, listed = data
    monkeypatch.setattr(fit, "SMALLEST", 1e-12)
    monkeypatch.setattr(prototypes, "SMALLEST", 1e-12)
    used = np.arange(N) % 7 != 3
    sums = (truth * used[:, None]).T.astype(np.float64) @ scaled(features)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    directions = np.divide(sums, lengths, out=np.zeros_like(sums), where=lengths > 0)
    alone = fit_prototypes(features, labels, used, depth=4)
    assert np.allclose(dense(alone), directions, rtol=4e-3, atol=1e-9) and not alone.bias.any()
    asked = np.broadcast_to(np.arange(K), (N, K)).copy()
    assert np.allclose(alone.margins(features, asked), scaled(features) @ directions.T, atol=4e-3)
    plain = fitted(features, labels, [(np.arange(N), listed)])
    both = add_prototypes(plain, alone, share)
    assert np.allclose(dense(both), dense(plain) + share * dense(alone), rtol=4e-3, atol=1e-9)
    assert np.array_equal(both.bias, plain.bias) and (both.depth, both.weight) == (plain.depth, plain.weight)


def test_what_is_near_zero_is_not_kept_in_prototypes_nor_in_their_sum_with_weights():
    rows = np.array([[1.0, 0.049, 0], [0, 0, 2.0]], np.float32)
    features, labels = CSR.from_scipy(rows), CSR.from_scipy(np.array([[1, 0, 0], [1, 0, 1.0]]), with_values=False)
    found = fit_prototypes(features, labels, np.ones(2, bool), depth=1)
    half = float_of(bits_of(np.float32(0.7071)))
    assert dense(found).tolist() == [[half, 0, half], [0, 0, 0], [0, 0, 1]]
    weights = Reranker(
        np.array([0, 1, 1, 2]), np.array([0, 1], np.int32), np.array([bits_of(-half + 0.01), bits_of(3.0)], np.uint16),
        np.zeros(3, np.float32), 3, 1, 1.5,
    )  # fmt: skip
    assert dense(add_prototypes(weights, found, 1.0)).tolist() == [[0, 0, half], [0, 0, 0], [0, 3, 1]]


def test_the_best_mix_is_that_of_the_most_ndcg_and_the_usual_one_unless_it_is_clearly_better():
    rng = np.random.default_rng(0)
    logits, margins, others, likeness = rng.normal(size=(4, 500, 8))
    n_true = rng.integers(1, 4, 500)

    def truth(scores):
        return np.argsort(np.argsort(-scores, axis=1), axis=1) < n_true[:, None]

    for which, weight, prototype in ((0, 3.0, 0.5), (1, 0.4, 4.0), (0, 6.0, 0.0), (0, 0.0, 0.0)):
        right = truth(logits + weight * ((margins, others)[which] + prototype * likeness))
        assert best_mix(logits, [margins, others], likeness, right, n_true) == (which, weight, prototype)
    right = truth(logits + 3 * margins)
    assert best_mix(logits, [margins], likeness, right, n_true, weights=(0.75,)) == (0, 0.75, 0)
    usual = (0, DEFAULT_WEIGHT, 0)
    assert best_mix(logits, [margins], likeness, np.zeros_like(right), n_true) == usual


def test_gains_of_a_few_samples_and_of_long_lists_do_not_count_too_much():
    logits = np.tile(np.arange(8.0, 0, -1), (100, 1))
    margins, right, zeros = np.zeros((100, 8)), np.zeros((100, 8), bool), np.zeros((100, 8))
    right[:, 0] = True
    margins[:2, 5] = 1.0  # from weight 6 on, this label is first: one sample gains 0.6 of its nDCG, another loses 0.4
    right[0] = np.arange(8) == 5
    one_each = np.ones(100, np.int64)
    assert best_mix(logits, [margins], zeros, right, one_each) == (0, DEFAULT_WEIGHT, 0)
    right[2:60], margins[2:60] = right[0], margins[0]
    assert best_mix(logits, [margins], zeros, right, one_each).weight >= 6
    margins[:], right[:] = 0, False
    right[:35, 0], margins[:35, 5] = True, 2.0  # from weight 3 on these lose a place, 0.37 of their nDCG
    right[35:, [0, 1, 2, 3, 7]], margins[35:, 7] = True, 1.9  # and these gain 0.39, but of the 2.95 that five labels give
    assert best_mix(logits, [margins], zeros, right, np.repeat([1, 5], [35, 65])) == (0, DEFAULT_WEIGHT, 0)
