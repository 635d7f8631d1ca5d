from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hashing_reference import bucket, carter_wegman, multiply_shift, smallest_prime_from
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.errors import ConfigError
from mach.hashing.families import CarterWegman, MultiplyShift, XXHash, is_prime, make_family, prime_from

TOP = 2**40
PRIME_ABOVE_TOP = TOP + 15
NAMES = ["", "Paris", "東京", "naïve", "x" * 300]


# A change of any value below orphans every stored model: the labels would be looked for in the wrong buckets.
@pytest.mark.parametrize(
    ("family", "n_labels", "n_buckets", "seed", "repetition", "labels", "buckets"),
    [
        ("carter-wegman", 1000, 64, 0, 0, range(8), [32, 56, 1, 10, 34, 43, 52, 12]),
        ("carter-wegman", 235000, 4096, 7, 3, [0, 1, 2, 117500, 234999], [216, 1087, 3489, 709, 331]),
        ("carter-wegman", TOP, 2**16, 1, 5, [0, 1, 2**32, TOP - 1], [19995, 63692, 2853, 41754]),
        ("multiply-shift", 1000, 64, 0, 0, range(8), [51, 37, 24, 10, 61, 47, 34, 20]),
        ("multiply-shift", 235000, 4096, 7, 3, [0, 1, 2, 117500, 234999], [629, 2957, 1188, 4, 1148]),
        ("multiply-shift", TOP, 2**16, 1, 5, [0, 1, 2**32, TOP - 1], [61427, 49278, 46834, 7797]),
    ],
)
def test_ids_keep_their_buckets_for_ever(family, n_labels, n_buckets, seed, repetition, labels, buckets):
    assert make_family(family, n_labels, n_buckets, seed, repetition).buckets(list(labels)).tolist() == buckets


@pytest.mark.parametrize(
    ("n_buckets", "seed", "repetition", "buckets"),
    [
        (64, 0, 0, [8, 59, 44, 33, 23]),
        (4096, 7, 3, [2603, 2044, 74, 73, 3327]),
        (2**32, 1, 5, [4164388344, 4167097993, 2181907399, 3799801747, 1023423364]),
    ],
)
def test_names_keep_their_buckets_for_ever(n_buckets, seed, repetition, buckets):  # as above
    assert make_family("xxhash", TOP, n_buckets, seed, repetition).buckets_of(NAMES).tolist() == buckets


sizes = st.one_of(st.integers(2, 3000), st.sampled_from([2**31, 2**32 - 5, 2**32 - 4, TOP - 87, TOP]))
PRIMES = {2**31: 2**31 + 11, 2**32 - 5: 2**32 - 5, 2**32 - 4: 2**32 + 15, TOP - 87: TOP - 87, TOP: PRIME_ABOVE_TOP}


@settings(max_examples=150)
@given(st.data(), sizes, st.sampled_from(["carter-wegman", "multiply-shift"]), st.integers(0, 2**63 - 1), st.integers(0, 999))
def test_equals_exact_integers(data, n_labels, family, seed, repetition):
    n_buckets = data.draw(st.integers(2, n_labels if n_labels < 2**33 else 2**25))
    labels = [*data.draw(st.lists(st.integers(0, n_labels - 1), max_size=20)), 0, n_labels - 1]
    fast = make_family(family, n_labels, n_buckets, seed, repetition).buckets(np.array(labels))
    prime = PRIMES.get(n_labels, 0)
    assert fast.dtype == np.int64
    assert fast.tolist() == [bucket(family, k, n_labels, n_buckets, seed, repetition, prime) for k in labels]


@settings(max_examples=100)
@given(
    st.sampled_from(list(PRIMES)),
    st.data(),
)
def test_no_parameter_overflows(n_labels, data):
    p = PRIMES[n_labels]
    near = st.one_of(st.integers(1, p - 1), st.integers(p - 3, p - 1))
    a, b, n_buckets = data.draw(near), data.draw(near), data.draw(st.integers(2, n_labels))
    labels = [0, 1, n_labels // 2, n_labels - 2, n_labels - 1]
    expected = [carter_wegman(k, a, b, p, n_buckets) for k in labels]
    assert CarterWegman(n_labels, n_buckets, a, b).buckets(labels).tolist() == expected


@settings(max_examples=60)
@given(st.text(), st.integers(2, 2**32), st.integers(0, 2**63 - 1), st.integers(0, 99))
def test_name_equals_exact_integers(name, n_buckets, seed, repetition):
    fast = make_family("xxhash", TOP, n_buckets, seed, repetition).buckets_of(iter([name]))
    assert fast.tolist() == [bucket("xxhash", name, TOP, n_buckets, seed, repetition)]


def test_multiply_shift_wraps_like_the_word():
    top = 2**64 - 1
    assert MultiplyShift(TOP, 99, top, top).buckets([TOP - 1]).tolist() == [
        multiply_shift(TOP - 1, top, top, 99, word=64, bits=25)
    ]


@pytest.mark.parametrize("p", [5, 11, 13])
def test_carter_wegman_is_2_universal(p):
    """Over all (a, b), every pair of labels collides equally often, within the stated bound, which is within 1/B."""
    for n_buckets in range(2, p + 1):
        collisions = np.zeros((p, p), dtype=int)
        for a, b in itertools.product(range(1, p), range(p)):
            buckets = CarterWegman(p, n_buckets, a, b).buckets(np.arange(p))
            collisions += buckets[:, None] == buckets
        share = collisions[~np.eye(p, dtype=bool)] / (p * (p - 1))
        assert share.min() == share.max()
        assert share.max() <= (-(-p // n_buckets) - 1) / (p - 1) + 1e-12
        assert (-(-p // n_buckets) - 1) / (p - 1) <= 1 / n_buckets


def test_multiply_shift_is_2_universal():
    """In a word of 8 bits, over all (a, b): pairs of the top bits are uniform, and buckets collide within 1/B + 2**-l."""
    word, n_labels = 8, 12
    bits = word + 1 - (n_labels - 1).bit_length()
    a, b = (x.ravel() for x in np.meshgrid(np.arange(2**word), np.arange(2**word)))
    tops = np.stack([((a * k + b) % 2**word) >> (word - bits) for k in range(n_labels)])
    for x, y in itertools.combinations(tops, 2):
        assert set(np.bincount(x * 2**bits + y, minlength=4**bits)) == {4**word // 4**bits}
    for n_buckets in range(2, n_labels + 1):
        buckets = tops * n_buckets >> bits
        assert buckets[3, 77] == multiply_shift(3, int(a[77]), int(b[77]), n_buckets, word=word, bits=bits)
        for x, y in itertools.combinations(buckets, 2):
            assert (x == y).mean() <= 1 / n_buckets + 2**-bits


@pytest.mark.parametrize("family", ["carter-wegman", "multiply-shift", "xxhash"])
def test_drawn_functions_collide_as_often_as_chance(family):
    """Repetitions are independent draws: the mean rate over 300 of them is within 5 standard deviations of 1/B."""
    n_labels, n_buckets, n_draws = 40, 8, 300
    rates = []
    for repetition in range(n_draws):
        drawn = make_family(family, n_labels, n_buckets, 3, repetition)
        buckets = drawn.buckets_of(map(str, range(n_labels))) if family == "xxhash" else drawn.buckets(range(n_labels))
        rates.append(float((buckets[:1] == buckets[1:]).mean()))  # label 0 against the others
    # each rate is a mean of 39 indicators with pairwise dependence at most total: variance <= p (1 - p)
    assert abs(np.mean(rates) - 1 / n_buckets) < 5 * (1 / n_buckets * 7 / n_buckets / n_draws) ** 0.5
    assert len(set(rates)) > 1


@settings(max_examples=60)
@given(st.integers(2, 400), st.data(), st.integers(0, 99))
def test_carter_wegman_inverse_and_loads(n_labels, data, repetition):
    n_buckets = data.draw(st.integers(2, n_labels))
    family = make_family("carter-wegman", n_labels, n_buckets, 0, repetition)
    buckets = family.buckets(range(n_labels)).tolist()
    for b in range(n_buckets):
        assert family.labels_of(b).tolist() == [k for k in range(n_labels) if buckets[k] == b]
    residues = CarterWegman(family.p, n_buckets, family.a, family.b).buckets(range(family.p))
    loads = np.bincount(residues, minlength=n_buckets)
    assert loads.max() - loads.min() <= 1 and loads.sum() == smallest_prime_from(n_labels)


def test_inverse_near_the_top():
    family = make_family("carter-wegman", TOP, 2**31, 5, 2)
    labels = family.labels_of(123_456)
    assert labels.dtype == np.int64 and len(labels) in (512, 513) and labels[-1] < TOP
    assert (np.diff(labels) > 0).all() and set(family.buckets(labels)) == {123_456}


def test_parameters_differ_between_families_seeds_and_repetitions():
    drawn = [make_family("carter-wegman", 10**6, 100, s, r) for s in range(3) for r in range(3)]
    assert len({f.a for f in drawn}) == len({f.b for f in drawn}) == 9
    assert make_family("multiply-shift", 10**6, 100, 0, 0).a % drawn[0].p != drawn[0].a - 1
    assert len({make_family("xxhash", 9, 2, s, r).seed for s in range(3) for r in range(3)}) == 9


def test_a_name_has_its_bucket_whatever_the_vocabulary():
    assert make_family("xxhash", 10, 8, 0, 0) == make_family("xxhash", 10**6, 8, 0, 0) == XXHash.draw(0, 8, 0, 0)


def test_primes():
    small = [n for n in range(2000) if n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))]
    assert [n for n in range(2000) if is_prime(n)] == small
    # strong pseudoprimes to the first 1, 2, 3, 4 and 5 primes; Carmichael numbers
    assert not any(map(is_prime, [2047, 1_373_653, 25_326_001, 3_215_031_751, 2_152_302_898_747, 561, 825_265]))
    assert [prime_from(n) for n in (1, 2, 8, 670_091, 2**32, TOP)] == [2, 2, 11, 670_097, 2**32 + 15, PRIME_ABOVE_TOP]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("carter-wegmann", 9, 2, 0, 0), "family='carter-wegmann' must be one of .*did you mean 'carter-wegman'"),
        (("carter-wegman", 1, 2, 0, 0), r"n_labels=1 must lie in \[2, 1099511627776\]"),
        (("carter-wegman", TOP + 1, 2, 0, 0), r"n_labels=1099511627777 must lie in \[2, 1099511627776\]"),
        (("carter-wegman", 9, 1, 0, 0), r"n_buckets=1 must lie in \[2, 9\]"),
        (("carter-wegman", 9, 10, 0, 0), r"n_buckets=10 must lie in \[2, 9\]"),
        (("carter-wegman", 9, 2, 0, -1), "repetition=-1 must be 0 or more"),
        (("multiply-shift", TOP, 2**25 + 1, 0, 0), r"n_buckets=33554433 must lie in \[2, 33554432\] .*use 'carter-wegman'"),
        (("xxhash", TOP, 2**32 + 1, 0, 0), r"n_buckets=4294967297 must lie in \[2, 4294967296\] .*use 'carter-wegman'"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        make_family(*arguments)


def test_hashing_loads_no_torch():
    code = "import sys, mach.hashing.bounds, mach.hashing; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
