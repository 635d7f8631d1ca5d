"""The scan in bytes: the plain scan's answer, bit for bit, whatever the scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.decoding import coarse, reference
from mach.decoding.coarse import LANES, coarse_topk
from mach.decoding.exact import COSTS, exact_topk
from mach.decoding.only import joined
from mach.decoding.scan import scan_topk
from mach.errors import ConfigError
from mach.hashing.table import LabelTable

BYTES = COSTS._replace(coarse=1e-9, pack=0.0, read=1e9)  # the scan in bytes costs nothing, a search too much
SCALES = [1e-45, 1e-42, 1e-36, 1e-20, 1.0, 1e6, 1e29]
SHAPES = ["normal", "integers", "constant", "one dwarfs all", "offset", "signed zeros", "rows differ", "few stand out"]


def scores_like(shape, rng, n_samples, n_repetitions, n_buckets, scale):
    """Make scores below 1e30 of a kind that bytes bear well, or badly."""
    scores_NRB = rng.normal(0, 1, (n_samples, n_repetitions, n_buckets))
    if shape == "integers":
        scores_NRB = rng.integers(-3, 4, scores_NRB.shape).astype(float)
    elif shape == "constant":
        scores_NRB[:] = rng.normal()
    elif shape == "one dwarfs all":
        scores_NRB[:, 0, 0] += 1e4 * rng.choice([-1, 1])
    elif shape == "offset":
        scores_NRB = 3 + rng.integers(0, 9, scores_NRB.shape) * 2.0**-22
    elif shape == "signed zeros":
        scores_NRB = rng.choice([0.0, -0.0], scores_NRB.shape)
    elif shape == "rows differ":
        scores_NRB *= np.exp(rng.normal(0, 3, (n_repetitions, 1))) / 1e3
    elif shape == "few stand out":
        scores_NRB = np.exp(3 * scores_NRB - 9)
    return (np.clip(scores_NRB, -2e4, 2e4) * min(scale, 1e25 if "dwarfs" in shape else scale)).astype(np.float32)


def same(found, expected):
    return np.array_equal(found.labels, expected.labels) and found.scores.tobytes() == expected.scores.tobytes()


@settings(max_examples=250)
@given(
    st.integers(0, 2**32), st.sampled_from(SHAPES), st.sampled_from(SCALES), st.integers(1, 40), st.integers(1, 70), st.booleans()
)  # fmt: skip
def test_bytes_and_floats_agree(seed, shape, scale, n_repetitions, n_samples, excludes):
    rng = np.random.default_rng(seed)
    n_buckets, n_labels = int(rng.integers(2, 40)), int(rng.choice([1, 300, 9000]))
    n_labels, k = n_labels + int(rng.integers(9)), int(rng.choice([1, 1, 5, 40]))
    table_RK = rng.integers(n_buckets, size=(n_repetitions, n_labels)).astype(np.uint8)
    table_RK[:, rng.integers(n_labels, size=n_labels // 4)] = table_RK[:, :1]  # labels alike
    scores_NRB = scores_like(shape, rng, n_samples, n_repetitions, n_buckets, scale)
    k = min(k, n_labels)
    rows = [np.zeros(0, np.int64)] * n_samples
    if excludes:
        best_Nk = scan_topk(scores_NRB, table_RK, k, estimator="logits", n_threads=1).labels
        rows = [np.sort(row[: min(int(rng.integers(k + 1)), n_labels - k)]) for row in best_Nk]
    found = coarse_topk(scores_NRB, table_RK, k, without=joined(rows), n_threads=1)
    assert same(found, scan_topk(scores_NRB, table_RK, k, estimator="logits", without=joined(rows), n_threads=1))


@pytest.mark.parametrize("n_repetitions", [3, 40, 300])
def test_most_labels_are_dismissed_and_the_float64_truth_is_found(monkeypatch, n_repetitions):
    """Of 300 repetitions the best labels' sums would not fit 16 bits."""
    monkeypatch.setattr(coarse, "scan_topk", None)  # nothing is left to it
    rng = np.random.default_rng(0)
    table = LabelTable.hashed(20_000, 500, n_repetitions)
    scores_NRB = rng.integers(-60, 61, (3, n_repetitions, 500)).astype(np.float32)
    for label in (9, 5000, 19_999):
        scores_NRB[:, np.arange(n_repetitions), table.array()[:, label]] = 60
    found = coarse_topk(scores_NRB, table.array(), 7, n_threads=1)
    for n in range(3):
        truth_K = sum(scores_NRB[n, r].astype(float)[table.array()[r]] for r in range(n_repetitions))
        assert found.labels[n].tolist() == reference.topk(truth_K.tolist(), 7)
        assert np.array_equal(found.scores[n], truth_K[found.labels[n]])


def test_what_bytes_cannot_tell_apart_is_scanned(monkeypatch):
    """A bucket 10**9 times the others takes all of a byte: the sample is scanned, and it alone."""
    rng, scanned = np.random.default_rng(0), []
    table_RK = rng.integers(50, size=(4, 9000)).astype(np.uint8)
    scores_NRB = rng.normal(0, 1, (LANES + 3, 4, 50)).astype(np.float32)
    scores_NRB[[2, LANES + 1], 0, 0] = -1e9
    truth = scan_topk(scores_NRB, table_RK, 5, estimator="logits")

    def spy(picked_NRB, *args, **how):
        scanned.append(picked_NRB)
        return scan_topk(picked_NRB, *args, **how)

    monkeypatch.setattr(coarse, "scan_topk", spy)
    assert same(coarse_topk(scores_NRB, table_RK, 5), truth)
    assert np.array_equal(scanned[0], scores_NRB[[2, LANES + 1]])


def test_many_alike_are_told_apart_before_a_sample_is_given_up(monkeypatch):
    """More labels share the best sum than are held at first: room grows until it holds them."""
    monkeypatch.setattr(coarse, "scan_topk", None)  # nothing is left to it
    rng = np.random.default_rng(4)
    table_RK = rng.integers(200, size=(6, 20_000)).astype(np.uint8)
    table_RK[:, 5000:6500] = table_RK[:, 5000:5001]
    scores_NRB = rng.integers(0, 5, (2, 6, 200)).astype(np.float32)
    scores_NRB[:, np.arange(6), table_RK[:, 5000]] = 9
    found = coarse_topk(scores_NRB, table_RK, 3, n_threads=1)
    assert found.labels.tolist() == 2 * [[5000, 5001, 5002]]
    assert found.scores.tolist() == 2 * [3 * [54.0]]


def test_threads_and_batches_do_not_change_a_bit():
    rng = np.random.default_rng(5)
    table_RK = rng.integers(300, size=(9, 30_000)).astype(np.uint16)
    scores_NRB = rng.normal(0, 1, (70, 9, 300)).astype(np.float32)
    every = coarse_topk(scores_NRB, table_RK, 6, n_threads=1)
    assert same(coarse_topk(scores_NRB, table_RK, 6, n_threads=3), every)
    for n in (0, 33, 69):
        one = coarse_topk(scores_NRB[n : n + 1], table_RK, 6, n_threads=4)
        assert np.array_equal(one.labels[0], every.labels[n])
        assert np.array_equal(one.scores[0], every.scores[n])


@settings(max_examples=40)
@given(st.integers(0, 2**32), st.sampled_from(["mean", "logits", "log-probs"]), st.booleans(), st.booleans())
def test_the_exact_search_leaves_samples_to_bytes(seed, estimator, restricts, excludes):
    rng = np.random.default_rng(seed)
    table = LabelTable.hashed(3000, 40, 5, seed=seed)
    scores_NRB = rng.integers(-9, 10, (12, 5, 40)).astype(np.float32)
    restrict = rng.choice(3000, 1000, replace=False) if restricts else None
    exclude = [rng.integers(3000, size=200) for _ in range(12)] if excludes else None
    how = {"estimator": estimator, "restrict": restrict, "exclude": exclude}
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mach.decoding.exact.coarse_topk", lambda *args, **how: calls.append(1) or coarse_topk(*args, **how))
        found, certificate = exact_topk(scores_NRB, table, 4, costs=BYTES, **how)
    assert calls
    assert certificate.scanned.all()
    for n in range(12):
        truth_K = sum(scores_NRB[n, r].astype(float)[table.array()[r]] for r in range(5))
        allowed = np.ones(3000, bool) if restrict is None else np.isin(np.arange(3000), restrict)
        if exclude is not None:
            allowed[exclude[n]] = False
        assert found.labels[n].tolist() == reference.topk(np.where(allowed, truth_K, -np.inf).tolist(), 4)


@pytest.mark.parametrize("k", [0, 10])
def test_what_does_not_fit_is_named(k):
    with pytest.raises(ConfigError, match=rf"k={k} must lie in \[1, 9\], the number of labels"):
        coarse_topk(np.zeros((1, 4, 9), np.float32), np.zeros((4, 9), np.uint8), k)
    with pytest.raises(ConfigError, match="the scores hold 3 repetitions, the table 4: select the same of both"):
        coarse_topk(np.zeros((1, 3, 9), np.float32), np.zeros((4, 9), np.uint8), 1)
