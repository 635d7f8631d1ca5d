"""The training samples most like a sample, and what they vote for: against slow loops in float64."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach import kernels
from mach.data import CSR
from mach.decoding.only import Only, allowed_of, joined
from mach.decoding.rerank import Neighbours, neighbours
from mach.kernels import float_of

S, N, F, K = 30, 6, 10, 15


def drawn(rng: np.random.Generator, n: int, density: float = 0.5) -> CSR:
    """Draw rows whose cosines have no ties."""
    return CSR.from_scipy(sp.csr_array((rng.random((n, F)) * (rng.random((n, F)) < density)).astype(np.float32)))


def labels_of(rng: np.random.Generator, n: int) -> CSR:
    return CSR.from_scipy(sp.csr_array(rng.random((n, K)) < 0.15), with_values=False)


def dense_of(found: Neighbours) -> np.ndarray:
    values = np.array([float_of(x) for x in found.samples.values])
    return sp.csr_array((values, found.samples.features, found.samples.indptr), shape=(len(found.labels), F)).toarray()


def test_used_samples_are_kept_at_length_one_without_what_is_near_zero():
    rng = np.random.default_rng(0)
    features, labels, used = drawn(rng, S), labels_of(rng, S), rng.random(S) < 0.6
    rows = features.to_scipy().toarray().astype(np.float64)[used]
    scaled = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-30)
    scaled[scaled < neighbours.SMALLEST] = 0
    found = Neighbours.of(features, labels, used)
    assert (scaled[rows > 0] == 0).any() and np.allclose(dense_of(found), scaled, atol=2**-9)
    assert np.array_equal(found.labels.to_scipy().toarray(), labels.to_scipy().toarray()[used])
    assert not found.samples.bias.any()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), st.integers(1, K), st.booleans(), st.booleans())
def test_neighbours_and_their_votes_are_those_of_a_slow_count(seed, n, is_one, is_limited):
    rng = np.random.default_rng(seed)
    features, labels = drawn(rng, S), labels_of(rng, S)
    kept = Neighbours.of(features, labels, np.ones(S, bool))
    own = rng.integers(0, S, N)
    asked = CSR.from_scipy(features.to_scipy()[own]) if is_one else drawn(rng, N)
    found = kept.find(asked, own if is_one else None)
    candidates = np.stack([rng.permutation(K)[:5] for _ in range(N)])
    candidates[rng.random(candidates.shape) < 0.2] = -1
    excluded = [np.sort(rng.permutation(K)[: rng.integers(0, 4)]) for _ in range(N)]
    subset = np.flatnonzero(rng.random(K) < 0.5)
    only = Only(*joined(excluded), allowed_of(subset, K)) if is_limited else None
    votes, near = kept.votes(found, candidates), kept.near(found, n, candidates, only)
    W, X, Y = dense_of(kept), asked.to_scipy().toarray().astype(np.float64), labels.to_scipy().toarray() > 0
    X /= np.maximum(np.linalg.norm(X, axis=1, keepdims=True), 1e-30)
    for i in range(N):
        cosines = W @ X[i]
        if is_one:
            cosines[own[i]] = 0
        order = [s for s in np.argsort(-cosines).tolist() if cosines[s] > 0]
        rows = found.rows[i][found.rows[i] >= 0]
        assert len(rows) == len(order) and np.allclose(cosines[rows], cosines[order], atol=1e-6)
        assert np.allclose(found.cosines[i], [*cosines[rows], *[0] * (neighbours.N_NEIGHBOURS - len(rows))], atol=1e-6)
        total = (cosines[order] ** 2).sum()
        shares = np.array([(cosines[order] ** 2 * Y[order, k]).sum() for k in range(K)])
        for j, k in enumerate(candidates[i]):
            largest = max((cosines[s] for s in order if Y[s, k]), default=0) if k >= 0 else 0
            assert votes[i, j] == pytest.approx([largest, shares[k] / total if k >= 0 and total > 0 else 0], abs=1e-5)
        gone = set(candidates[i].tolist())
        gone |= (set(excluded[i].tolist()) | (set(range(K)) - set(subset.tolist()))) if is_limited else set()
        expected = [k for k in range(K) if shares[k] > 0 and k not in gone]
        listed = [k for k in near[i].tolist() if k >= 0]
        assert len(listed) == len(set(listed)) == min(n, len(expected)) and set(listed) <= set(expected)
        assert near[i].tolist() == listed + [-1] * (n - len(listed))
        assert np.allclose(shares[listed], np.sort(shares[expected])[::-1][: len(listed)], atol=1e-5)


def test_no_more_than_a_number_of_neighbours_vote(monkeypatch):
    monkeypatch.setattr(neighbours, "N_NEIGHBOURS", 2)
    features = CSR.from_scipy(sp.csr_array(np.array([[1, 0.1], [1, 0.2], [1, 3]], np.float32)))
    labels = CSR(np.array([0, 1, 2, 3]), np.array([0, 1, 2], np.int32), None, 3)
    kept, asked = Neighbours.of(features, labels, np.ones(3, bool)), CSR.from_scipy(sp.csr_array(np.array([[1, 0]], np.float32)))
    found = kept.find(asked)
    assert found.rows.tolist() == [[0, 1]]
    votes = kept.votes(found, np.array([[0, 1, 2]]))[0]
    assert votes[2].tolist() == [0, 0] and votes[:2, 1].sum() == pytest.approx(1)


def test_a_sample_without_features_has_no_neighbours():
    rng = np.random.default_rng(1)
    kept = Neighbours.of(drawn(rng, S), labels_of(rng, S), np.ones(S, bool))
    empty = CSR(np.zeros(2, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), F)
    found = kept.find(empty)
    assert (found.rows == -1).all() and not found.cosines.any()
    assert not kept.votes(found, np.array([[1, 2]])).any() and kept.near(found, 3, np.array([[1, 2]])).tolist() == [[-1] * 3]


def test_many_samples_in_threads_get_the_same_as_one_by_one(monkeypatch):
    rng = np.random.default_rng(2)
    kept, asked = Neighbours.of(drawn(rng, S), labels_of(rng, S), np.ones(S, bool)), drawn(rng, 600)
    candidates = np.stack([rng.permutation(K)[:4] for _ in range(600)])
    monkeypatch.setattr(kernels, "N_THREADS", 3)
    found = kept.find(asked)
    votes, near = kept.votes(found, candidates), kept.near(found, 5, candidates)
    for i in [*range(0, 600, 41), 255, 511, 599]:  # and the last of each task
        one = kept.find(CSR.from_scipy(asked.to_scipy()[[i]]))
        assert np.array_equal(one.rows[0], found.rows[i]) and np.array_equal(one.cosines[0], found.cosines[i])
        assert np.array_equal(kept.votes(one, candidates[i : i + 1])[0], votes[i])
        assert np.array_equal(kept.near(one, 5, candidates[i : i + 1])[0], near[i])
