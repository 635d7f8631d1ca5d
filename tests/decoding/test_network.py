"""What weighs opinions: against slow references, and the order of a second stage that asks it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from mach import kernels
from mach.data import CSR
from mach.decoding import TopK
from mach.decoding.only import Only, allowed_of, no_lists
from mach.decoding.rerank import (
    N_OPINIONS,
    Evidence,
    Neighbours,
    Network,
    Opinions,
    Reranker,
    SparseWeights,
    fit_network,
    hear,
    look_around,
    network,
    sum_of,
)
from mach.kernels import bits_of

F, K, S = 12, 25, 40


def some_network(rng: np.random.Generator, M: int = 3, D: int = N_OPINIONS, H: int = 5) -> Network:
    shapes = (M, D, H), (M, H), (M, H, H), (M, H), (M, H), (M, D), (M,)
    return Network(*(rng.normal(size=shape).astype(np.float32) for shape in shapes))


def slow_scores(net: Network, x: np.ndarray) -> np.ndarray:
    """Give the scores of opinions (..., D) in float64."""
    total = 0.0
    for m in range(len(net.bias)):
        one = np.maximum(x @ net.first[m].astype(np.float64) + net.first_bias[m], 0)
        two = np.maximum(one @ net.second[m].astype(np.float64) + net.second_bias[m], 0)
        total = total + two @ net.out[m].astype(np.float64) + x @ net.skip[m].astype(np.float64) + net.bias[m]
    return total / len(net.bias)


def test_scores_are_those_of_the_definition_and_the_same_bits_for_one_candidate_and_for_many(monkeypatch):
    rng = np.random.default_rng(0)
    net, x = some_network(rng), rng.normal(size=(40, 6, N_OPINIONS)).astype(np.float32)
    whole = net.scores(x)
    assert np.allclose(whole, slow_scores(net, x.astype(np.float64)), atol=1e-4)
    assert net.scores(x[:0]).shape == (0, 6)
    monkeypatch.setattr(network, "ROWS_A_TASK", 7)
    monkeypatch.setattr(kernels, "N_THREADS", 3)
    assert np.array_equal(net.scores(x), whole) and np.array_equal(net.scores(x[3:4, 2:3]), whole[3:4, 2:3])


def test_a_sum_weighs_each_opinion_by_a_number():
    x = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    found = sum_of((1, 0.5, -2))
    assert np.allclose(found.scores(x), x @ np.array([1, 0.5, -2]), atol=1e-6) and found.n_parameters == 4


def opinions_of(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw opinions where a label is right if just one of the first two is above zero, which no sum can say."""
    x = rng.normal(size=(n, 6, 3)).astype(np.float32) * [1, 5, 1] + [0, 0, 100]
    is_candidate = rng.random((n, 6)) < 0.9
    return x.astype(np.float32), is_candidate, ((x[:, :, 0] > 0) != (x[:, :, 1] > 0)) & is_candidate


def test_networks_learn_what_no_sum_can_say():
    rng = np.random.default_rng(0)
    net, _ = fit_network(*opinions_of(rng, 400))
    x, is_candidate, right = opinions_of(rng, 300)
    log_odds = net.scores(x)
    assert ((log_odds > 0) == right)[is_candidate].mean() > 0.9  # zero is even odds: half of them are right
    best = np.where(is_candidate, log_odds, -np.inf).argmax(1)
    assert right[np.arange(300), best][right.any(1)].mean() > 0.97


def test_a_sample_is_judged_by_networks_that_have_not_seen_it():
    rng = np.random.default_rng(1)
    x, is_candidate, right = opinions_of(rng, 90)
    net, unseen = fit_network(x, is_candidate, right)
    again, same = fit_network(x, is_candidate, right)
    assert np.array_equal(unseen, same) and np.array_equal(net.out, again.out)
    other = right.copy()
    other[5] = ~other[5]
    changed, judged = fit_network(x, is_candidate, other)
    assert np.array_equal(judged[5], unseen[5])  # by itself not at all
    assert not np.array_equal(judged[6], unseen[6]) and not np.array_equal(changed.out, net.out)


def test_places_that_hold_no_candidate_do_not_matter():
    rng = np.random.default_rng(2)
    x, is_candidate, right = opinions_of(rng, 60)
    strange = np.where(is_candidate[:, :, None], x, 7).astype(np.float32)
    one, other = fit_network(x, is_candidate, right)[0], fit_network(strange, is_candidate, right)[0]
    assert np.allclose(one.scores(x), other.scores(x), atol=1e-4)


def test_an_opinion_that_was_always_the_same_does_not_count():
    rng = np.random.default_rng(4)
    x, is_candidate, right = opinions_of(rng, 60)
    x = np.concatenate([x, np.full((60, 6, 1), 2.5, np.float32)], 2)
    net, other = fit_network(x, is_candidate, right)[0], x.copy()
    other[:, :, 3] = 1e6
    assert np.array_equal(net.scores(other), net.scores(x)) and not np.array_equal(net.scores(-x), net.scores(x))


def made(rng: np.random.Generator, n_near: int, depth: int) -> Reranker:
    """Make a second stage of weights, prototypes and samples whose products have no ties."""

    def sparse(n: int = K) -> SparseWeights:
        W = sp.random(n, F, 0.4, random_state=int(rng.integers(1 << 30)), format="csr", dtype=np.float32)
        bits = np.array([bits_of(np.float32(x)) for x in W.data], np.uint16)
        return SparseWeights(W.indptr.astype(np.int64), W.indices.astype(np.int32), bits, np.zeros(n, np.float32), F)

    weights = dataclasses.replace(sparse(), bias=rng.normal(size=K).astype(np.float32))
    counts = rng.integers(0, 50, K).astype(np.int32)
    labels = sp.csr_array((rng.random((S, K)) < 0.1).astype(np.float32))
    neighbours = Neighbours(sparse(S), CSR.from_scipy(labels, with_values=False))
    return Reranker(weights, depth, 1.5, Opinions(Evidence(sparse(), counts, neighbours), some_network(rng), n_near))


@settings(max_examples=200)
@given(
    st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, K), st.sampled_from([0, 1, 4]), st.sampled_from(["all", "some"])
)  # fmt: skip
def test_the_order_is_that_of_the_log_odds_over_what_is_decoded_and_what_is_near(seed, depth, k, n_near, which):
    rng = np.random.default_rng(seed)
    found = made(rng, n_near, depth)
    features = CSR.from_scipy(sp.random(5, F, 0.5, random_state=seed % 1000, format="csr", dtype=np.float32))
    kept = np.arange(K) if which == "all" else np.sort(rng.permutation(K)[: max(k, K // 2)])
    only = None if which == "all" else Only(*no_lists(5), allowed_of(kept, K))
    n = min(len(kept), max(k, depth))
    labels = np.stack([rng.permutation(kept)[:n] for _ in range(5)])
    scores = -np.sort(-rng.normal(size=(5, n)), axis=1).astype(np.float32)
    top = found.rerank(features, TopK(labels, scores), k, 2, only)
    more, d = found.opinions, min(depth, n)
    around, near = look_around(features, labels[:, :d], more.evidence, n_near, only)
    heard, is_candidate = hear(features, labels[:, :d], scores[:, :d] / 2, around, near, found.weights, more.evidence)
    log_odds = 2 * more.network.scores(heard)
    for i in range(5):
        candidates = [*labels[i, :d].tolist(), *near[i].tolist()]
        first = sorted((-float(s), label) for s, label in zip(log_odds[i], candidates, strict=True) if label >= 0)
        assert is_candidate[i].sum() == len(first)
        expected = [label for _, label in first]
        expected += [label for label in labels[i, d:].tolist() if label not in expected]
        assert top.labels[i].tolist() == expected[:k] and (np.diff(top.scores[i]) <= 0).all()
        assert np.allclose(top.scores[i, : len(first)], [-s for s, _ in first][:k], atol=1e-5)
        later = [float(s) for s, label in zip(scores[i, d:], labels[i, d:], strict=True) if label not in candidates]
        assert np.allclose(np.diff(top.scores[i, len(first) :]), np.diff(later)[: max(0, k - len(first) - 1)], atol=1e-4)


def test_what_is_heard_of_a_candidate():
    rng = np.random.default_rng(3)
    found = made(rng, 2, 3)
    evidence = found.opinions.evidence
    features = CSR.from_scipy(sp.random(2, F, 0.6, random_state=5, format="csr", dtype=np.float32))
    labels, logits = np.array([[3, 8, 1], [20, 0, 5]]), np.array([[2, 1, -1], [0.5, 0.25, 0]], np.float32)
    near, around = np.array([[9, -1], [2, 7]]), evidence.neighbours.find(features)
    heard, is_candidate = hear(features, labels, logits, around, near, found.weights, evidence)
    every = np.concatenate([labels, near], 1)
    assert is_candidate.tolist() == (every >= 0).tolist() and not heard[0, 4].any()
    assert heard[:, 3:, 0].tolist() == [[-1, 0], [0, 0]]  # at most the last that was decoded
    known = np.maximum(every, 0)
    told = [weights.margins(features, known) for weights in (found.weights, evidence.prototypes)]
    told += list(np.moveaxis(evidence.neighbours.votes(around, every), 2, 0))
    assert all(each.any() for each in told)
    for i, j in zip(*np.nonzero(every >= 0), strict=True):
        own = [heard[i, j, 0], *(each[i, j] for each in told)]
        best = [logits[i, 0], *(each[i][every[i] >= 0].max() for each in told)]
        expected = [*own, *np.subtract(own, best), np.log1p(evidence.counts[every[i, j]])]
        assert heard[i, j].tolist() == pytest.approx(expected, abs=1e-6)


def test_without_neighbours_nothing_is_near_and_nothing_is_said():
    rng = np.random.default_rng(4)
    found = made(rng, 2, 3)
    evidence = dataclasses.replace(found.opinions.evidence, neighbours=None)
    features = CSR.from_scipy(sp.random(2, F, 0.6, random_state=5, format="csr", dtype=np.float32))
    labels, logits = np.array([[3, 8, 1], [20, 0, 5]]), np.array([[2, 1, -1], [0.5, 0.25, 0]], np.float32)
    around, near = look_around(features, labels, evidence, 2)
    assert near.shape == (2, 0)
    heard, _ = hear(features, labels, logits, around, near, found.weights, evidence)
    full = found.opinions.evidence
    more, _ = hear(features, labels, logits, full.neighbours.find(features), near, found.weights, full)
    silent = [3, 4, 8, 9]
    assert not heard[:, :, silent].any() and more[:, :, silent].any()
    others = np.setdiff1d(np.arange(N_OPINIONS), silent)
    assert np.array_equal(heard[:, :, others], more[:, :, others])


def test_its_key_tells_what_weighs_and_what_is_found():
    found = made(np.random.default_rng(0), 2, 3)
    more = found.opinions
    evidence, kept = more.evidence, more.evidence.neighbours
    fewer = CSR(kept.labels.indptr, (kept.labels.indices + 1) % K, None, K)

    def with_evidence(**how) -> Reranker:
        return dataclasses.replace(found, opinions=dataclasses.replace(more, evidence=dataclasses.replace(evidence, **how)))

    others = [
        dataclasses.replace(found, opinions=None),
        dataclasses.replace(found, opinions=dataclasses.replace(more, n_near=3)),
        dataclasses.replace(found, opinions=dataclasses.replace(more, network=some_network(np.random.default_rng(9)))),
        with_evidence(counts=evidence.counts + 1),
        with_evidence(prototypes=found.weights),
        with_evidence(neighbours=None),
        with_evidence(neighbours=dataclasses.replace(kept, samples=found.weights)),
        with_evidence(neighbours=dataclasses.replace(kept, labels=fewer)),
    ]
    keys = [each.key for each in (found, *others)]
    assert len(set(keys)) == len(keys) and dataclasses.replace(found).key == keys[0]
