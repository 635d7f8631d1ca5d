"""Learnt tables: against loops that read like the text, evenly loaded, the same however the samples are cut, for ever."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mach.hashing import grouping
from mach.hashing.grouping import CHOICES, RARE, ROUNDS, LabelSums, group_labels, is_grouped

ONES = 2**64 - 1


def samples_of(seed, n_samples=60, n_features=30, n_labels=25):
    """Give rows of features and of labels, as lists of (id, value) and of ids."""
    rng = np.random.default_rng(seed)
    x = [
        sorted((int(f), float(np.float32(rng.normal()))) for f in set(rng.integers(n_features, size=5))) for _ in range(n_samples)
    ]
    y = [sorted({int(k) for k in rng.integers(n_labels, size=int(rng.integers(0, 4)))}) for _ in range(n_samples)]
    x[3], y[3] = [], [0]  # a sample without features says nothing
    return x, y


def counts_of(y, n_labels):
    return np.bincount([k for row in y for k in row], minlength=n_labels)


def add(sums, x, y):
    def csr(rows):
        return np.cumsum([0, *map(len, rows)]).astype(np.int64)

    features = np.array([f for row in x for f, _ in row], np.int32)
    values = np.array([v for row in x for _, v in row], np.float32)
    sums.add(csr(x), features, values, csr(y), np.array([k for row in y for k in row], np.int32))


def table_of(x, y, n_labels, n_buckets, seed=0, repetition=0):
    sums = LabelSums(counts_of(y, n_labels), seed=seed, repetition=repetition)
    add(sums, x, y)
    return group_labels(sums, n_buckets, seed=seed, repetition=repetition)


def key_of(seed, repetition, what):
    return int.from_bytes(hashlib.blake2b(f"grouping/{seed}/{repetition}/{what}".encode(), digest_size=8).digest(), "little")


def drawn(key, i):
    x = (key + (i + 1) * 0x9E3779B97F4A7C15) & ONES
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & ONES
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & ONES
    return x ^ (x >> 31)


def signs_of(key, row, width):
    return np.array([1.0 if drawn(key, row * (width // 64) + i // 64) >> (i % 64) & 1 else -1.0 for i in range(width)])


def shuffled(n, key):
    ids = list(range(n))
    for i in range(n - 1, 0, -1):
        j = drawn(key, i) % (i + 1)
        ids[i], ids[j] = ids[j], ids[i]
    return ids


def reference_directions(x, y, rare, seed, repetition, width):
    key = key_of(seed, repetition, "signs")
    sums = {k: np.zeros(width) for k in rare}
    for features, labels in zip(x, y, strict=True):
        length = math.sqrt(sum(v * v for _, v in features))
        for k in set(labels) & set(rare):
            sums[k] += sum((v / length * signs_of(key, f, width) for f, v in features), np.zeros(width))
    empty = {k: signs_of(key ^ ONES, t, width) for t, k in enumerate(rare)}
    found = {k: sums[k] if sums[k].any() else empty[k] for k in rare}
    return {k: z / np.linalg.norm(z) for k, z in found.items()}


def reference_table(x, y, n_labels, n_buckets, seed, repetition, width):
    """Group labels in float64 loops, by recursion."""
    counts = counts_of(y, n_labels)
    order = sorted(shuffled(n_labels, key_of(seed, repetition, "order")), key=lambda k: -counts[k])
    rare = [k for k in range(n_labels) if counts[k] < grouping.RARE]
    table, loads = [-1] * n_labels, [0] * n_buckets
    for i, k in enumerate([k for k in order if counts[k] >= grouping.RARE]):
        choices = [drawn(key_of(seed, repetition, "choices"), CHOICES * i + j) % n_buckets for j in range(CHOICES)]
        table[k] = min(choices, key=lambda b: loads[b])
        loads[table[k]] += counts[k] + 1
    z = reference_directions(x, y, rare, seed, repetition, width)
    rooms = [max(0, math.ceil((sum(counts) + n_labels) / n_buckets) - load) for load in loads]
    bounds = [sum(rooms[:b]) * len(rare) // sum(rooms) for b in range(n_buckets + 1)]
    n_drawn, halves = 0, key_of(seed, repetition, "halves")

    def cut(part, low, high):  # the right half first
        nonlocal n_drawn
        if high - low == 1 or len(part) < 2:
            for b in range(low, high):
                for k in part[bounds[b] - bounds[low] : bounds[b + 1] - bounds[low]]:
                    table[k] = b
            return
        middle = (low + high) // 2
        n, n_left = len(part), bounds[middle] - bounds[low]
        if 0 < n_left < n:
            one = drawn(halves, n_drawn) % n
            other = (one + 1 + drawn(halves, n_drawn + 1) % (n - 1)) % n
            n_drawn += 2
            direction = z[part[one]] - z[part[other]]
            for _ in range(ROUNDS):
                along = {k: float(z[k] @ direction) for k in part}
                part = sorted(part, key=along.__getitem__)
                direction = np.mean([z[k] for k in part[n_left:]], 0) - np.mean([z[k] for k in part[:n_left]], 0)
        cut(part[n_left:], middle, high)
        cut(part[:n_left], low, middle)

    cut([rare[t] for t in shuffled(len(rare), key_of(seed, repetition, "rare"))], 0, n_buckets)
    return table


@pytest.mark.parametrize("seed", range(12))
def test_tables_are_the_references(seed, monkeypatch):
    monkeypatch.setattr(grouping, "RARE", 5)
    monkeypatch.setattr(grouping, "WIDTH", 64)
    x, y = samples_of(seed)
    n_buckets = 2 + seed
    found = table_of(x, y, 25, n_buckets, seed=seed, repetition=3)
    assert found.tolist() == reference_table(x, y, 25, n_buckets, seed, 3, 64)


def test_directions_are_the_references(monkeypatch):
    x, y = samples_of(1)
    sums = LabelSums(counts_of(y, 40), seed=7, repetition=2)  # labels 25..39 have no samples
    add(sums, x, y)
    expected = reference_directions(x, y, range(40), 7, 2, grouping.WIDTH)
    assert np.allclose(sums.directions(), [expected[k] for k in range(40)], atol=1e-6)


@settings(max_examples=60)
@example(0, 82, 1.0, 0.5)  # 7 / 82 * 82 is less than 7 in float64
@given(st.integers(0, 2**32), st.integers(2, 300), st.floats(0, 1), st.sampled_from([0.5, 2.0, 30.0]))
def test_every_label_has_a_bucket_and_loads_are_even(seed, n_labels, where, spread):
    rng = np.random.default_rng(seed)
    n_buckets = 2 + int((n_labels - 2) * where)
    counts = rng.lognormal(1, 1, n_labels).astype(int) if spread < 30 else rng.integers(0, 200, n_labels)
    found = group_labels(LabelSums(counts, seed=seed, repetition=1), n_buckets, seed=seed, repetition=1)
    assert found.shape == (n_labels,) and found.min() >= 0 and found.max() < n_buckets
    n_rare_B = np.bincount(found[counts < RARE], minlength=n_buckets)
    load_B = np.bincount(found[counts >= RARE], counts[counts >= RARE] + 1, minlength=n_buckets)
    room_B = np.maximum(0, -(-int((counts + 1).sum()) // n_buckets) - load_B)
    if (counts < RARE).any():  # as many rare labels as the bucket has room for, to one label
        assert (np.abs(n_rare_B - n_rare_B.sum() * room_B / room_B.sum()) <= 1).all()
    if (counts < RARE).all():
        assert n_rare_B.max() - n_rare_B.min() <= 1


def test_the_most_frequent_share_no_bucket():
    counts = np.array([1000] * 10 + [1] * 2000)
    found = group_labels(LabelSums(counts, seed=0, repetition=0), 100, seed=0, repetition=0)
    assert len(set(found[:10])) == 10
    assert not set(found[:10]) & set(found[10:])


def test_labels_whose_samples_look_alike_share_a_bucket():
    """Eight topics of eight labels: each topic has its own features."""
    rng = np.random.default_rng(0)
    topics = rng.permutation(np.repeat(np.arange(8), 8))
    y = [[k] for k in range(64) for _ in range(5)]
    x = [[(int(f), 1.0) for f in sorted(rng.choice(6, 3, replace=False) + 6 * topics[k])] for (k,) in y]
    for repetition in range(3):
        found = table_of(x, y, 64, 8, repetition=repetition)
        assert len({(topics[k], found[k]) for k in range(64)}) <= 12  # a random table has about 42


def test_samples_may_come_in_any_cut():
    x, y = samples_of(5, n_samples=200)
    whole = table_of(x, y, 25, 6)
    sums = LabelSums(counts_of(y, 25), seed=0, repetition=0)
    for start in range(0, 200, 7):
        add(sums, x[start : start + 7], y[start : start + 7])
    assert group_labels(sums, 6, seed=0, repetition=0).tolist() == whole.tolist()


def test_repetitions_and_seeds_differ():
    x, y = samples_of(5, n_samples=400, n_labels=100)
    tables = [table_of(x, y, 100, 10, seed=s, repetition=r) for s, r in ((0, 0), (0, 1), (1, 0))]
    assert len({tuple(t) for t in tables}) == 3


# A change below means that a run which is resumed would not go on with the table that it began with.
def test_a_table_is_frozen():
    x, y = samples_of(9, n_samples=500, n_labels=100)
    found = table_of(x, y, 100, 16, seed=1, repetition=2)
    assert hashlib.blake2b(found.astype("<i8").tobytes(), digest_size=8).hexdigest() == "9264081c401f1168"


@given(st.floats(0, 1), st.integers(0, 200))
def test_a_share_of_any_number_of_repetitions_is_grouped(share, n):
    assert sum(is_grouped(r, share) for r in range(n)) == int(n * share)
