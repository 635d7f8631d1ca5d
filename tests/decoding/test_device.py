"""Decoding with torch on a tensor's device, here the CPU: the answer is the scan's, bit for bit, and the reference's."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach import decoding
from mach.config import Estimator, Loss
from mach.decoding import decode_topk, reference
from mach.decoding.device import device_bucket_scores, pruned, search, topk_on_device, torch_scan
from mach.decoding.device.labels import k_best
from mach.decoding.estimators import bucket_scores
from mach.decoding.exact import exact_topk
from mach.decoding.scan import scan_topk
from mach.errors import ConfigError, MissingExtra
from mach.hashing.table import LabelTable

LOSSES = Loss.__args__
ESTIMATORS = Estimator.__args__
FAMILIES = ["carter-wegman", "multiply-shift", "xxhash"]
AGGREGATE = {"mean": sum, "logits": sum, "log-probs": sum, "min": min, "median": statistics.median}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Have several chunks of blocks and of samples even in small problems."""
    monkeypatch.setattr(torch_scan, "SCORES", 5000)


def problem(seed, *, n_labels=400, family="carter-wegman", integers=False):
    rng = np.random.default_rng(seed)
    n_labels = int(rng.integers(2, n_labels))
    n_buckets, n_repetitions = int(rng.integers(2, min(n_labels, 150) + 1)), int(rng.integers(1, 12))
    names = [f"name {i}" for i in range(n_labels)]
    table = LabelTable.hashed(n_labels, n_buckets, n_repetitions, seed=seed, family=family, label_names=names)
    scores_NRB = rng.normal(0, rng.choice([0.0, 1.0, 3.0]), (int(rng.integers(1, 12)), n_repetitions, n_buckets))
    scores_NRB = np.round(scores_NRB) if integers else scores_NRB * rng.choice([1e-3, 1.0, 1e6])
    return table, scores_NRB.astype(np.float32)


def truth(scores_RB, table, estimator):
    rows = [[float(scores_RB[r][b]) for b in table.array()[r]] for r in range(table.n_repetitions)]
    return [AGGREGATE[estimator](column) for column in zip(*rows, strict=True)]


def same(found, expected):
    return np.array_equal(found.labels.numpy(), expected.labels) and np.array_equal(found.scores.numpy(), expected.scores)


@settings(max_examples=150)
@given(
    st.integers(0, 2**32), st.floats(0, 1), st.sampled_from(ESTIMATORS), st.sampled_from(FAMILIES), st.booleans(),
    st.sampled_from([1, 8, 64]),
)  # fmt: skip
def test_device_scan_and_reference_agree(seed, share, estimator, family, integers, width):
    table, scores_NRB = problem(seed, family=family, integers=integers)
    k = 1 + int(share * (table.n_labels - 1))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEAST_WIDTH", width)
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, estimator=estimator)
    assert same(found, scan_topk(scores_NRB, table.array(), k, estimator=estimator, n_threads=1))
    if integers:
        assert found.labels[0].tolist() == reference.topk(truth(scores_NRB[0], table, estimator), k)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("k", [1, 100, 3000])
def test_a_larger_problem_in_many_blocks(estimator, k):
    rng = np.random.default_rng(1)
    table = LabelTable.hashed(50_021, 300, 6)  # no power of 2 divides it
    scores_NRB = rng.normal(size=(3, 6, 300)).round(1).astype(np.float32)  # rounded: sums tie often
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_scan, "SCORES", 1 << 17)
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, estimator=estimator)
    assert same(found, scan_topk(scores_NRB, table.array(), k, estimator=estimator))


def test_equal_scores_give_the_first_labels():
    table = LabelTable.hashed(5000, 100, 4)
    zeros = torch.zeros(2, 4, 100)
    zeros[:, :, ::2] = -0.0
    assert topk_on_device(zeros, table, 700, estimator="min").labels.tolist() == [list(range(700))] * 2


@given(st.integers(0, 2**32), st.integers(1, 60), st.integers(1, 60))
def test_k_best_orders_any_float(seed, n, k):
    rng = np.random.default_rng(seed)
    row = rng.choice([-np.inf, -3e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1e-38, 2.0, 3e38, np.inf], n).astype(np.float32)
    k = min(k, n)
    assert k_best(torch.from_numpy(row[None]), k)[0].tolist() == np.argsort(-row, kind="stable")[:k].tolist()


@settings(max_examples=120)
@given(
    st.integers(0, 2**32), st.sampled_from(ESTIMATORS), st.sampled_from(FAMILIES), st.booleans(), st.booleans(),
    st.sampled_from([1, 64]),
)  # fmt: skip
def test_restrict_and_exclude_are_exact(seed, estimator, family, restricts, excludes, width):
    rng = np.random.default_rng(seed)
    table, scores_NRB = problem(seed, family=family, integers=True)
    K = table.n_labels
    best = [reference.topk(truth(scores_RB, table, estimator), K) for scores_RB in scores_NRB]
    restrict = rng.integers(K, size=rng.integers(1, 2 * K)).tolist() if restricts else None
    exclude = [row[: rng.integers(0, K)] for row in best] if excludes else None  # the best: those that would be found
    left = [
        [label for label in row if (restrict is None or label in restrict) and (exclude is None or label not in exclude[n])]
        for n, row in enumerate(best)
    ]
    k = min(5, *map(len, left))
    if k == 0:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "LEAST_WIDTH", width)
        how = {"estimator": estimator, "restrict": restrict, "exclude": exclude}
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, **how)
    assert found.labels.tolist() == [row[:k] for row in left]


def prune_at_once(patch, **other):
    """Let small problems be searched, in few cells that many labels share, a few samples at a time."""
    small = {"LEAST_DEPTH": 2, "GUESS_ROWS": 3, "SHARE": 2, "MOST_CELLS": 256, "TOUCHED": 40_000, "GUESSES": 1}
    for name, value in {**small, **other}.items():
        patch.setattr(pruned, name, value)


def planted_problem(seed, integers=False):
    """Make scores in which a few labels stand out, some of them alike, over noise that may tie."""
    table, scores_NRB = problem(seed, n_labels=2000, integers=integers)
    rng = np.random.default_rng(seed)
    for n in range(len(scores_NRB)):
        for label in rng.integers(table.n_labels, size=int(rng.integers(0, 12))):
            spread = np.abs(scores_NRB[n]).max() + 1
            scores_NRB[n, np.arange(table.n_repetitions), table.array()[:, label]] += np.float32(spread * rng.integers(1, 4))
    return table, scores_NRB


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.sampled_from(["mean", "logits", "log-probs"]), st.booleans(), st.booleans())
def test_the_pruned_search_is_the_scan(seed, estimator, integers, excludes):
    with pytest.MonkeyPatch.context() as patch:
        prune_at_once(patch)
        table, scores_NRB = planted_problem(seed, integers)
        k = min(1 + seed % 7, table.n_labels // 2)
        best = scan_topk(scores_NRB, table.array(), k, estimator=estimator).labels
        exclude = [row[: n % (k + 1)] for n, row in enumerate(best)] if excludes else None
        how = {"estimator": estimator, "exclude": exclude}
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, **how)
        assert same(found, exact_topk(scores_NRB, table, k, n_threads=1, **how)[0])


@pytest.mark.parametrize("n_cells", [2048, 1 << 22])
def test_what_stands_out_is_proven_and_what_is_flat_is_scanned(n_cells, monkeypatch):
    prune_at_once(monkeypatch, MOST_CELLS=n_cells, SHARE=16)
    rng = np.random.default_rng(3)
    table = LabelTable.hashed(30_000, 1500, 12)
    scores_NRB = rng.normal(0, 0.1, (4, 12, 1500)).astype(np.float32)
    for n in (0, 2, 3):
        for label in rng.choice(30_000, 40, replace=False):
            scores_NRB[n, np.arange(12), table.array()[:, label]] += rng.normal(3, 0.5)
    for k in (1, 5, 30):
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, estimator="logits")
        assert found.is_pruned.tolist() == [True, False, True, True]
        assert same(found, scan_topk(scores_NRB, table.array(), k, estimator="logits"))
        found = topk_on_device(torch.from_numpy(scores_NRB), table, k, estimator="logits", exclude=[[], [7], [8], []])
        expected = exact_topk(scores_NRB, table, k, estimator="logits", exclude=[[], [7], [8], []])[0]
        assert same(found, expected)
        assert not topk_on_device(torch.from_numpy(scores_NRB), table, k, estimator="logits", prune=False).is_pruned.any()


def test_unless_told_it_prunes_where_a_scan_would_look_up_much(monkeypatch):
    prune_at_once(monkeypatch, SHARE=16)
    table, scores_NRB = LabelTable.hashed(30_000, 1500, 12), torch.zeros(2, 12, 1500)
    for r, bucket in enumerate(table.array()[:, 7]):
        scores_NRB[:, r, bucket] = 1.0
    for least, prune, prunes in ((360_000, None, True), (360_001, None, False), (360_001, True, True), (0, False, False)):
        monkeypatch.setattr(torch_scan.TorchScan, "pruned_from", least)
        found = topk_on_device(scores_NRB, table, 1, estimator="logits", prune=prune)
        assert found.labels.tolist() == [[7], [7]] and found.is_pruned.tolist() == [prunes, prunes]


def test_too_many_candidates_are_left_to_the_scan(monkeypatch):
    """All labels of one repetition's best buckets tie."""
    table = LabelTable.hashed(5000, 100, 1)
    scores = torch.zeros(1, 1, 100)
    scores[0, 0, 17:23] = 1.0
    expected = sorted(label for b in range(17, 23) for label in table.labels_of(b, 0))
    for most in (10_000, 100):
        prune_at_once(monkeypatch, LEAST_DEPTH=10, MOST_CANDIDATES=most, MOST_CELLS=1 << 22, GUESSES=4)
        found = topk_on_device(scores, table, 40, estimator="logits")
        assert found.labels[0].tolist() == expected[:40]
        assert bool(found.is_pruned) == (most == 10_000)


def test_sums_that_round_are_proven_with_their_rounding(monkeypatch):
    """Large terms that cancel: a bound without room for rounding would drop labels that the scan keeps."""
    rng, n_pruned = np.random.default_rng(0), 0
    for seed in range(300):
        prune_at_once(monkeypatch, MOST_CELLS=1 << 22, SHARE=1, LEAST_DEPTH=1 + seed % 9)
        table = LabelTable.hashed(300, 40, 6, seed=seed)
        scores_NRB = (rng.choice([1.0, 3e7, -3e7], (4, 6, 40)) + rng.normal(0, 4, (4, 6, 40))).astype(np.float32)
        found = topk_on_device(torch.from_numpy(scores_NRB), table, 5, estimator="logits")
        assert same(found, scan_topk(scores_NRB, table.array(), 5, estimator="logits"))
        n_pruned += int(found.is_pruned.sum())
    assert n_pruned > 100


def test_labels_beyond_32_bits():
    table = LabelTable.hashed(2**40, 50, 4)
    scores_NRB = np.random.default_rng(0).normal(size=(2, 4, 50)).astype(np.float32)
    restrict = np.arange(2**40 - 300, 2**40)
    table_RM = np.stack([table.buckets(restrict, row) for row in range(4)]).astype(np.uint8)
    expected = scan_topk(scores_NRB, table_RM, 200, estimator="logits")
    how = {"estimator": "logits", "restrict": restrict}
    found = topk_on_device(torch.from_numpy(scores_NRB), table, 200, **how)
    assert np.array_equal(found.labels.numpy(), restrict[expected.labels])
    best = found.labels[:, :1].tolist()
    without = topk_on_device(torch.from_numpy(scores_NRB), table, 199, exclude=best, **how)
    assert torch.equal(without.labels, found.labels[:, 1:])


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("scale", [0.1, 3.0, 80.0, 1e29])
def test_bucket_scores_are_those_of_numpy_to_rounding(loss, estimator, scale):
    logits_NRB = np.random.default_rng(3).normal(0, scale, (4, 5, 300)).astype(np.float32)
    found = device_bucket_scores(torch.from_numpy(logits_NRB), loss=loss, estimator=estimator)
    expected = bucket_scores(logits_NRB.copy(), loss=loss, estimator=estimator)
    rtol = 2e-6 + (abs(logits_NRB).max() * 2.4e-7 if loss == "softmax" and scale < 1e9 else 0)  # the rounding of z - max z
    atol = 1e-6 if estimator == "mean" else 2e-5 if loss == "softmax" and estimator == "log-probs" else 1e-37
    np.testing.assert_allclose(found.numpy(), expected, rtol=rtol, atol=atol)


def test_bucket_scores_leave_the_outputs_alone():
    logits = torch.randn(2, 3, 40)
    before = logits.clone()
    for estimator in ESTIMATORS:
        device_bucket_scores(logits, loss="softmax", estimator=estimator)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30])
def test_an_output_that_is_no_number_is_named(value):
    logits = torch.zeros(5, 4, 30)
    logits[3, 2, 29] = logits[3, 3, 0] = logits[4, 0, 0] = value
    with pytest.raises(ConfigError, match=r"sample 3, repetition 9: .* not a finite number below 1e\+30; train or copy"):
        device_bucket_scores(logits, loss="logistic", estimator="logits", repetitions=[7, 8, 9, 10])


@pytest.mark.parametrize("identity", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_decode_is_one_entry_for_arrays_and_tensors(identity, estimator):
    """A tensor of the CPU takes the array's way, in its own memory; what a GPU takes is called here by name."""
    table = LabelTable.identity(300) if identity else LabelTable.hashed(300, 40, 6)
    logits_NRB = np.random.default_rng(2).normal(0, 3, (3, table.n_repetitions, table.n_buckets)).astype(np.float32)
    how = {"loss": "softmax", "estimator": estimator, "exclude": [[1], [], [2, 3]]}
    expected = decode_topk(logits_NRB.copy(), table, 9, **how)
    found = decode_topk(torch.from_numpy(logits_NRB.copy()), table, 9, **how)
    assert np.array_equal(found.labels, expected.labels)
    assert np.array_equal(found.scores, expected.scores)
    used = "min" if identity and estimator == "mean" else estimator  # as decode_topk does
    there = decoding._on_device(torch.from_numpy(logits_NRB), table, 9, "softmax", used, {"exclude": how["exclude"]})
    assert (there.labels.dtype, there.scores.dtype) == (np.int64, np.float32)
    assert np.array_equal(there.labels, expected.labels)
    np.testing.assert_allclose(there.scores, expected.scores, rtol=1e-5, atol=1e-6)


def test_no_samples():
    found = topk_on_device(torch.zeros(0, 4, 5), LabelTable.hashed(9, 5, 4), 3, estimator="mean", exclude=[])
    assert found.labels.shape == found.scores.shape == (0, 3)


@pytest.mark.parametrize(
    ("shape", "dtype", "how", "reason"),
    [
        ((1, 3, 10), torch.float32, {}, r"must be a float32 tensor \(N, 2, 10\), .* got torch.float32 \(1, 3, 10\)"),
        ((1, 2, 10), torch.float64, {}, r"got torch.float64 \(1, 2, 10\)"),
        ((1, 2, 10), torch.float32, {"k": 51}, r"k=51 must lie in \[1, 50\], the number of labels"),
        ((1, 2, 10), torch.float32, {"restrict": [50]}, r"restrict: labels must lie in \[0, 50\), got 50..50"),
        ((1, 2, 10), torch.float32, {"exclude": [range(50)]}, r"k=1 is above the 0 labels that sample 0 is left with"),
    ],
)
def test_what_cannot_be_decoded_is_named(shape, dtype, how, reason):
    with pytest.raises(ConfigError, match=reason):
        topk_on_device(torch.zeros(shape, dtype=dtype), LabelTable.hashed(50, 10, 2), **{"k": 1, "estimator": "min", **how})


def test_triton_asked_for_and_absent_is_named(monkeypatch):
    monkeypatch.setattr("mach.decoding.device.has_triton", lambda: False)
    with pytest.raises(MissingExtra, match=r"the scan in Triton needs an optional package: pip install 'mach\[gpu\]'"):
        topk_on_device(torch.zeros(1, 2, 10), LabelTable.hashed(50, 10, 2), 1, estimator="min", how="triton")
