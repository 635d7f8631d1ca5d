"""The pruned search: its answer is the scan's, bit for bit, and the reference's; what it may find can be narrowed."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.config import Estimator
from mach.decoding import decode_topk, reference
from mach.decoding.exact import COSTS, exact_topk
from mach.decoding.scan import scan_topk
from mach.errors import ConfigError
from mach.hashing.table import LabelTable

ESTIMATORS = Estimator.__args__
AGGREGATE = {"mean": sum, "logits": sum, "log-probs": sum, "min": min, "median": statistics.median}
ALWAYS = COSTS._replace(scan=1e9, median=1e9, coarse=1e9)  # a scan is never cheaper
NEVER = COSTS._replace(scan=0.0, median=0.0, lay=0.0)
SLOW_SCAN = COSTS._replace(scan=9.0, coarse=1e9)  # pays only where a search has to open most buckets


def problem(seed, *, n_labels=400, family="carter-wegman", integers=False, n_samples=1):
    """Make a table and scores in which a few labels stand out, some of them alike, over noise that may tie.

    Family "given": every other repetition, from the first, has buckets given to it, of very different sizes.
    """
    rng = np.random.default_rng(seed)
    n_labels = int(rng.integers(2, n_labels))
    n_buckets = int(rng.integers(2, min(n_labels, 150) + 1))
    hashed = "carter-wegman" if family == "given" else family
    table = LabelTable.hashed(n_labels, n_buckets, int(rng.integers(1, 12)), seed=seed, family=hashed)
    if family == "given":
        rows = {r: (n_buckets * rng.random(n_labels) ** 3).astype(np.int64) for r in table.repetitions[::2]}
        table = table.with_given(rows)
    R, B = table.n_repetitions, table.n_buckets
    scores_NRB = rng.normal(0, rng.choice([0.0, 0.1, 1.0]), (n_samples, R, B))
    for n in range(n_samples):
        for label in rng.integers(n_labels, size=int(rng.integers(0, 12))):
            scores_NRB[n, np.arange(R), table.array()[:, label]] += rng.integers(2, 9)
    scores_NRB = np.round(3 * scores_NRB) if integers else scores_NRB * rng.choice([1e-3, 1.0, 1e6])
    return table, scores_NRB.astype(np.float32)


def truth(scores_RB, table, estimator):
    """Score all labels in float64: exact where scores are small integers."""
    rows = [[float(scores_RB[r][b]) for b in table.array()[r]] for r in range(table.n_repetitions)]
    return [AGGREGATE[estimator](column) for column in zip(*rows, strict=True)]


def same(found, expected):
    return np.array_equal(found.labels, expected.labels) and np.array_equal(found.scores, expected.scores)


def check(seed, estimator, family="carter-wegman", integers=False):
    """Compare search, scan and, where sums are exact, reference; give whether the search found a certificate."""
    table, scores_NRB = problem(seed, family=family, integers=integers)
    k = min(1 + seed % 7, table.n_labels)
    found, certificate = exact_topk(scores_NRB, table, k, estimator=estimator, n_threads=1, costs=ALWAYS)
    scanned = scan_topk(scores_NRB, table.array(), k, estimator=estimator, n_threads=1)
    assert same(found, scanned), (seed, estimator, family, integers)
    if integers:
        assert found.labels[0].tolist() == reference.topk(truth(scores_NRB[0], table, estimator), k)
    return not certificate.scanned[0]


@settings(max_examples=150)
@given(
    st.integers(0, 2**32), st.sampled_from(ESTIMATORS), st.sampled_from(["carter-wegman", "multiply-shift", "given"]),
    st.booleans(),
)  # fmt: skip
def test_search_scan_and_reference_agree(seed, estimator, family, integers):
    check(seed, estimator, family, integers)


@pytest.mark.parametrize("n_problems", [150, pytest.param(2500, marks=pytest.mark.slow)])  # of each estimator: 12,500
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_many_small_problems_and_most_are_certified(estimator, n_problems):
    n_certified = sum(check(seed, estimator, integers=seed % 2 == 0) for seed in range(n_problems))
    assert n_certified > n_problems / 3


@pytest.mark.parametrize("family", ["carter-wegman", "multiply-shift"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [1, 5, 100, 1000])
def test_a_larger_problem_is_certified_and_touches_few(family, estimator, k):
    rng = np.random.default_rng(3)
    table = LabelTable.hashed(60_000, 1500, 12, family=family)
    scores_NRB = rng.normal(0, 0.1, (3, 12, 1500)).astype(np.float32)
    for n in range(3):
        for label in rng.choice(60_000, 40, replace=False):
            scores_NRB[n, np.arange(12), table.array()[:, label]] += rng.normal(3, 0.5)
    found, certificate = exact_topk(scores_NRB, table, k, estimator=estimator, n_threads=2, costs=ALWAYS)
    assert same(found, scan_topk(scores_NRB, table.array(), k, estimator=estimator))
    if k <= 5:
        assert not certificate.scanned.any()
        assert certificate.n_scored.max() < 400
        assert certificate.n_touched.max() < 12 * 60_000 // 10
        assert (certificate.n_scored >= k).all()


def test_equal_scores_give_the_first_labels_and_are_scanned():
    table = LabelTable.hashed(5000, 100, 4)
    found, certificate = exact_topk(np.zeros((2, 4, 100), np.float32), table, 50, estimator="logits", costs=ALWAYS)
    assert np.array_equal(found.labels, np.tile(np.arange(50), (2, 1)))
    assert certificate.scanned.all()


def test_ties_at_the_last_place_go_to_the_smaller_label():
    """All labels of the best bucket of a single repetition tie."""
    table = LabelTable.hashed(5000, 100, 1)
    scores_NRB = np.zeros((1, 1, 100), np.float32)
    scores_NRB[0, 0, 17], scores_NRB[0, 0, 18] = 2.0, 1.0
    for k in (1, 20, 50, 60):
        found, certificate = exact_topk(scores_NRB, table, k, estimator="mean", costs=ALWAYS)
        assert not certificate.scanned.any()
        assert found.labels[0].tolist() == [*table.labels_of(17, 0), *table.labels_of(18, 0)][:k]


def test_sums_that_round_are_certified_with_their_rounding():
    """Scores a few units in the last place apart: sums that differ exactly tie in float32, or change places."""
    n_certified = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        table = LabelTable.hashed(300, 64, 6, seed=seed)
        scores_NRB = 1 + rng.integers(0, 9, (1, 6, 64)) * 2.0**-23
        scores_NRB[0, 0, table.array()[0, :3]] += rng.choice([0, 2.0**-22, 2.0**-17])
        found, certificate = exact_topk(scores_NRB.astype(np.float32), table, 2, estimator="logits", costs=ALWAYS)
        assert same(found, scan_topk(scores_NRB.astype(np.float32), table.array(), 2, estimator="logits"))
        n_certified += not certificate.scanned[0]
    assert n_certified > 50


def test_threads_batches_and_costs_do_not_change_a_bit():
    table, scores_NRB = problem(12, n_labels=5000, n_samples=40)
    one = exact_topk(scores_NRB, table, 2, estimator="mean", n_threads=1, costs=ALWAYS)[0]
    for n_threads in (2, 3, 50):
        for costs in (COSTS, ALWAYS, NEVER):
            assert same(exact_topk(scores_NRB, table, 2, estimator="mean", n_threads=n_threads, costs=costs)[0], one)


def test_a_scan_that_costs_nothing_is_taken():
    table, scores_NRB = problem(12, n_samples=3)
    certificate = exact_topk(scores_NRB, table, 1, estimator="mean", costs=NEVER)[1]
    assert certificate.scanned.all()
    assert not certificate.n_scored.any()
    assert not certificate.n_touched.any()


def test_no_samples():
    table, _ = problem(1)
    found, certificate = exact_topk(
        np.zeros((0, table.n_repetitions, table.n_buckets), np.float32), table, 1, estimator="mean", exclude=[]
    )
    assert found.labels.shape == (0, 1)
    assert certificate.depth.shape == (0,)


@settings(max_examples=120)
@given(
    st.integers(0, 2**32), st.sampled_from(ESTIMATORS), st.sampled_from(["carter-wegman", "multiply-shift"]), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_restrict_and_exclude_are_exact(seed, estimator, family, restricts, excludes, prunes):
    rng = np.random.default_rng(seed)
    table, scores_NRB = problem(seed, family=family, integers=True, n_samples=2)
    K = table.n_labels
    truths = [truth(scores_RB, table, estimator) for scores_RB in scores_NRB]
    best = [reference.topk(truth_K, K) for truth_K in truths]
    restrict = rng.integers(K, size=rng.integers(1, 2 * K)).tolist() if restricts else None  # in any order, some twice
    exclude = [row[: rng.integers(0, K)] for row in best] if excludes else None  # the best: those that would be found
    left = [
        [label for label in row if (restrict is None or label in restrict) and (exclude is None or label not in exclude[n])]
        for n, row in enumerate(best)
    ]
    k = min(5, *map(len, left))
    if k == 0:
        return
    found, _ = exact_topk(
        scores_NRB, table, k, estimator=estimator, restrict=restrict, exclude=exclude, costs=ALWAYS if prunes else NEVER
    )
    assert found.labels.tolist() == [row[:k] for row in left]
    assert found.scores.tolist() == [[truth_K[label] for label in row[:k]] for truth_K, row in zip(truths, left, strict=True)]


def test_excluding_what_a_search_finds_gives_the_next():
    table = LabelTable.hashed(60_000, 1500, 12)
    scores_NRB = np.random.default_rng(0).normal(0, 0.1, (1, 12, 1500)).astype(np.float32)
    planted = [7, 500, 59_999, 31, 8]
    for place, label in enumerate(planted):
        scores_NRB[0, np.arange(12), table.array()[:, label]] = 9 - place
    for n_known in range(4):
        how = {"estimator": "logits", "exclude": [planted[:n_known]], "costs": ALWAYS}
        found, certificate = exact_topk(scores_NRB, table, 2, **how)
        assert found.labels.tolist() == [planted[n_known : n_known + 2]]
        assert not certificate.scanned.any()


def test_samples_given_up_keep_their_own_exclusions():
    rng, table = np.random.default_rng(6), LabelTable.hashed(60_000, 1500, 12)
    scores_NRB = rng.normal(0, 0.1, (40, 12, 1500)).astype(np.float32)
    for n in range(20):  # the others are noise, in which nothing stands out
        scores_NRB[n, np.arange(12), table.array()[:, 100 * n]] = 9
    best = scan_topk(scores_NRB, table.array(), 8, estimator="logits").labels
    exclude = [row[: 1 + n % 5] for n, row in enumerate(best)]
    found, certificate = exact_topk(scores_NRB, table, 3, estimator="logits", exclude=exclude, n_threads=1, costs=SLOW_SCAN)
    assert found.labels.tolist() == [row[1 + n % 5 :][:3].tolist() for n, row in enumerate(best)]
    assert 8 <= certificate.scanned.sum() <= 32


@pytest.mark.parametrize("identity", [False, True])
def test_decode_takes_both(identity):
    table = LabelTable.identity(300) if identity else LabelTable.hashed(300, 40, 6)
    R, B = table.n_repetitions, table.n_buckets
    logits_NRB = np.random.default_rng(2).normal(0, 3, (2, R, B)).astype(np.float32)
    every = decode_topk(logits_NRB.copy(), table, 300, loss="softmax", estimator="mean").labels.tolist()
    restrict, exclude = list(range(0, 300, 3)), [every[0][:40], []]
    found = decode_topk(
        logits_NRB.copy(), table, 9, loss="softmax", estimator="mean", restrict=restrict, exclude=exclude
    ).labels.tolist()
    assert found == [[k for k in row if k % 3 == 0 and k not in gone][:9] for row, gone in zip(every, exclude, strict=True)]


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ({"restrict": [0, 50]}, r"restrict: labels must lie in \[0, 50\), got 0..50"),
        ({"restrict": [3, 3]}, r"k=2 must lie in \[1, 1\], the number of different labels in restrict"),
        ({"restrict": [0.5]}, r"restrict must be a list of label ids, got float64 of shape \(1,\)"),
        ({"exclude": [[1]]}, r"exclude holds 1 lists of labels, but there are 2 samples: give one each"),
        ({"exclude": [[1], [-1]]}, r"exclude\[1\]: labels must lie in \[0, 50\), got -1..-1"),
        ({"exclude": [[], range(49)]}, r"k=2 is above the 1 labels that sample 1 is left with: exclude fewer"),
        ({"restrict": [1, 2], "exclude": [[1], [5]]}, r"k=2 is above the 1 labels that sample 0 is left with"),
    ],
)
def test_what_cannot_be_narrowed_is_named(identity, how, reason):
    table = LabelTable.identity(50) if identity else LabelTable.hashed(50, 10, 2)
    logits_NRB = np.zeros((2, table.n_repetitions, table.n_buckets), np.float32)
    with pytest.raises(ConfigError, match=reason):
        decode_topk(logits_NRB, table, 2, loss="logistic", estimator="min", **how)


def test_a_table_that_does_not_fit_is_named():
    with pytest.raises(ConfigError, match=r"scores \(N, 3, 10\) do not fit the table: 2 repetitions, 10 buckets"):
        exact_topk(np.zeros((1, 3, 10), np.float32), LabelTable.hashed(50, 10, 2), 1, estimator="mean")
    with pytest.raises(ConfigError, match="the identity table has nothing to prune: take topk_identity"):
        exact_topk(np.zeros((1, 1, 50), np.float32), LabelTable.identity(50), 1, estimator="mean")
