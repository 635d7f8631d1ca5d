"""Rows found by their products: against a slow search over all of them."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mach import kernels
from mach.data import CSR
from mach.decoding.rerank import Nearest, SparseWeights, nearest
from mach.kernels import bits_of

N, F, K = 7, 9, 150  # more than a block of sums


def weights_of(W: np.ndarray) -> SparseWeights:
    rows = sp.csr_array(W)
    bits = np.array([bits_of(np.float32(x)) for x in rows.data], np.uint16)
    indptr, features = rows.indptr.astype(np.int64), rows.indices.astype(np.int32)
    return SparseWeights(indptr, features, bits, np.zeros(len(W), np.float32), W.shape[1])


def slowly(W: np.ndarray, x: np.ndarray, n: int, besides: int = -1) -> list[int]:
    """Give the n rows of the largest products above zero, ties by the smaller number, -1 where there are no more."""
    products = W.astype(np.float64) @ x
    found = [row for row in np.lexsort((np.arange(len(W)), -products)).tolist() if products[row] > 0 and row != besides]
    return (found + [-1] * n)[:n]


@pytest.mark.parametrize("all_from", [0.0, 2.0, 1e9])  # never, as sums are few, always
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.booleans())
def test_it_finds_what_a_search_over_all_rows_finds(all_from, monkeypatch, seed, n, is_one):
    monkeypatch.setattr(nearest, "ALL_FROM", all_from)
    rng = np.random.default_rng(seed)  # small whole numbers: sums are exact, many are equal, some come back to zero
    W = rng.integers(-2, 3, (K, F)) * (rng.random((K, F)) < 0.4)
    X = rng.integers(-1, 3, (N, F)) * (rng.random((N, F)) < 0.5)
    besides = rng.integers(-1, K, N) if is_one else None
    found = Nearest.of(weights_of(W)).find(CSR.from_scipy(sp.csr_array(X.astype(np.float32))), n, besides)
    for i in range(N):
        assert found[i].tolist() == slowly(W, X[i], n, -1 if besides is None else besides[i])


@pytest.mark.parametrize(("entries", "opened"), [(100, 3), (8, 2), (7, 1), (3, 1), (0, 1)])
def test_the_shortest_lists_are_opened_up_to_a_number_of_entries(entries, opened):
    W = np.zeros((12, 3))
    W[0, 1] = 1
    W[1:3, 1] = 0.5  # three rows
    W[2:7, 2] = 0.25  # five
    W[3:, 0] = 2  # nine
    x = np.array([[1, 1, 1]], np.float32)
    lists = [[1], [1, 2], [0, 1, 2]][opened - 1]
    found = Nearest.of(weights_of(W)).find(CSR.from_scipy(sp.csr_array(x)), 4, entries=entries)
    assert found[0].tolist() == slowly(W[:, lists], np.ones(len(lists)), 4)


def test_many_samples_in_threads_find_the_same_as_one_by_one(monkeypatch):
    rng = np.random.default_rng(1)
    W, X = rng.random((K, F)) * (rng.random((K, F)) < 0.3), rng.random((600, F)).astype(np.float32)
    nearest_of, features = Nearest.of(weights_of(W)), CSR.from_scipy(sp.csr_array(X))
    besides = rng.integers(0, K, 600)
    monkeypatch.setattr(kernels, "N_THREADS", 3)
    found = nearest_of.find(features, 5, besides)
    for i in [*range(0, 600, 37), 255, 511, 599]:  # and the last of each task
        one = CSR.from_scipy(sp.csr_array(X[i : i + 1]))
        assert np.array_equal(nearest_of.find(one, 5, besides[i : i + 1])[0], found[i])
    empty = CSR(np.zeros(2, np.int64), np.empty(0, np.int32), np.empty(0, np.float32), F)
    assert nearest_of.find(empty, 2).tolist() == [[-1, -1]]
