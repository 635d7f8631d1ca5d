"""The step size, the seeds and the order of the data: frozen, since resuming and adding repetitions rest on them."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.train.schedule import order_of, rate_at, seed_of


@given(st.integers(1, 500), st.floats(0, 1))
def test_the_rate_rises_to_one_then_falls_and_is_never_negative(n_steps, warmup):
    rates = [rate_at(step, n_steps, warmup) for step in range(n_steps)]
    rise = max(1, round(warmup * n_steps))
    assert all(0 <= rate <= 1 for rate in rates)
    assert rates[rise - 1] == 1
    assert all(a < b for a, b in pairwise(rates[:rise]))
    assert all(a >= b for a, b in pairwise(rates[rise - 1 :]))
    assert rates[0] > 0  # the first step is not lost


@given(st.integers(20, 10**6))
def test_the_rate_ends_near_zero(n_steps):
    assert rate_at(n_steps - 1, n_steps, 0.05) < 0.02
    assert rate_at(n_steps, n_steps, 0.05) == pytest.approx(0, abs=1e-12)


def test_rates_are_frozen():
    rates = [rate_at(step, 10, 0.2) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[6] == pytest.approx(0.5)
    assert rates[9] == pytest.approx(0.5 * (1 + math.cos(math.pi * 7 / 8)))


def test_seeds_are_frozen():
    """A change makes resumed and added repetitions other than those trained before."""
    assert seed_of() == 6510301506637419378
    assert seed_of(0, "weights", 0) == 5409347080047710043
    assert seed_of(0, "dropout", 3, 1000) == 1732241073865702308
    assert seed_of(2**63 - 1, "order", -1) == 1406148860657953409


@given(st.lists(st.one_of(st.integers(), st.sampled_from(["order", "weights"])), max_size=4))
def test_a_seed_fits_torch_and_numpy(key):
    assert 0 <= seed_of(*key) < 2**63


@given(st.integers(0, 300), st.integers(0, 2**63 - 1), st.integers(-1, 50))
def test_an_order_is_a_permutation(n_samples, seed, epoch):
    order = order_of(n_samples, seed, epoch)
    assert order.dtype == np.int64 and sorted(order.tolist()) == list(range(n_samples))


def test_epochs_and_seeds_differ():
    orders = {tuple(order_of(50, seed, epoch)) for seed in range(5) for epoch in range(-1, 5)}
    assert len(orders) == 30


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40 - 1), max_size=5))
def test_a_place_is_found_without_the_others(n_samples, seed, places):
    places = np.unique([place % n_samples for place in places]).astype(np.int64)
    found = order_of(n_samples, seed, 3, places)
    assert len(set(found.tolist())) == len(places) and all(0 <= sample < n_samples for sample in found)
    if n_samples <= 300:
        assert found.tolist() == order_of(n_samples, seed, 3)[places].tolist()


def test_every_sample_comes_anywhere_equally_often():
    """Chi-squared of (place, sample) over many epochs, and of neighbours' distances: a shuffle, not a pattern."""
    n, epochs = 13, 4000
    orders = np.array([order_of(n, 0, epoch) for epoch in range(epochs)])
    counts = np.array([np.bincount(orders[:, place], minlength=n) for place in range(n)])
    expected = epochs / n
    assert ((counts - expected) ** 2 / expected).sum() < 230  # 144 degrees of freedom: 99.9 % lie below 201
    steps = np.bincount((np.diff(orders, axis=1) % n).ravel(), minlength=n)[1:]
    expected = epochs * (n - 1) / (n - 1)
    assert ((steps - expected) ** 2 / expected).sum() < 60


def test_orders_are_frozen():
    assert order_of(8, 0, 0).tolist() == [4, 3, 1, 0, 2, 5, 6, 7]
    assert order_of(8, 0, 1).tolist() == [6, 2, 4, 3, 1, 0, 7, 5]
    assert order_of(8, 7, -1).tolist() == [3, 6, 1, 2, 7, 0, 4, 5]
    assert order_of(10**12, 7, 2, [0, 1, 10**12 - 1]).tolist() == [786674287977, 886361534045, 726503049187]
