from __future__ import annotations

import dataclasses
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.config import WIDTH, Config
from mach.errors import ConfigError
from mach.hashing import LabelTable
from mach.hashing.bounds import (
    encoder_parameters,
    ensemble_cost,
    expected_collisions,
    failure_probability,
    full_cost,
    head_parameters,
    propose,
    repetitions_for,
)


def test_repetitions_for_known_sizes():
    assert repetitions_for(235_000, 4096, 0.01) == math.ceil(2 * math.log(235_000 / math.sqrt(0.02)) / math.log(4096)) == 4
    assert repetitions_for(1024, 2, 0.5) == 20  # 1024**2 / (2 * 0.5) = 2**20: exact powers are not rounded up,
    assert repetitions_for(10, 5, 0.4) == 3  # 10**2 / (2 * 0.4) = 5**3, nor where the logarithms err
    assert repetitions_for(2, 2, 0.99) == 2


@given(st.integers(2, 10**9), st.data(), st.fractions(Fraction(1, 10**6), Fraction(9, 10)))
def test_repetitions_are_the_fewest_that_keep_the_promise(n_labels, data, delta):
    n_buckets = data.draw(st.integers(2, n_labels))
    n = repetitions_for(n_labels, n_buckets, float(delta))
    slack = 1 + Fraction(1, 10**6)
    assert Fraction(n_labels**2, 2) / n_buckets**n <= delta * slack
    assert n == 1 or Fraction(n_labels**2, 2) / n_buckets ** (n - 1) > delta / slack
    assert failure_probability(n_labels, n_buckets, n) <= float(delta * slack)


def test_failure_probability():
    assert failure_probability(1000, 10, 8) == pytest.approx(1000**2 / 2 / 10**8)
    assert failure_probability(1000, 10, 2) == 1.0
    assert failure_probability(2**40, 2**20, 64) == pytest.approx(0.0, abs=1e-300)


def test_failures_are_as_rare_as_promised():
    """Draw 400 tables of 30 labels: labels confounded in every repetition at most as often as the union bound, plus noise."""
    failed = 0
    for seed in range(400):
        array_RK = LabelTable.hashed(30, 6, 4, seed=seed).array()
        failed += len(np.unique(array_RK, axis=1).T) < 30
    bound = failure_probability(30, 6, 4)
    assert 0 < failed / 400 <= bound + 4 * math.sqrt(bound / 400)


def test_expected_collisions():
    assert expected_collisions(1001, 10, 2) == pytest.approx((100, 10))
    table = LabelTable.hashed(1001, 10, 60)
    others = np.mean([np.sum(row == row[500]) - 1 for row in table.array()])
    assert others == pytest.approx(100, rel=0.01)  # Carter-Wegman balances its loads


def test_costs_by_hand():
    assert encoder_parameters(100, 8, 2) == 100 * 8 + 8 + 2 * (64 + 8)
    assert head_parameters(50, 8) == 50 * 8 + 50
    hashed = ensemble_cost(n_labels=1000, n_buckets=300, n_repetitions=4, hidden=8, n_features=100, layers=2, active_features=7)
    assert dataclasses.asdict(hashed) == {
        "encoder_parameters": 4 * 952,
        "head_parameters": 4 * 2700,
        "parameters": 4 * 3652,
        "weight_bytes": 16 * 3652,
        "table_bytes": 4 * 1000 * 2,
        "training_bytes": 4 * (4 * (800 + 100) + 12 * (3652 - 800)) + 8000,  # an input row of 8 weights has one moment
        "encoder_multiply_adds": 4 * (7 * 8 + 2 * 64),
        "head_multiply_adds": 4 * 300 * 8,
    }
    assert hashed.table_bytes == LabelTable.hashed(1000, 300, 4).nbytes
    full = full_cost(n_labels=1000, hidden=8, n_features=100, layers=2)
    kept = 2 * 8000 + 4 * 1000 + 8 * 1000  # weights in bfloat16, biases, and a number an output for each of them
    assert (full.parameters, full.table_bytes, full.training_bytes) == (952 + 9000, 0, 12 * 152 + 4 * 900 + kept)
    assert (full.encoder_multiply_adds, full.head_multiply_adds) == (100 * 8 + 2 * 64, 8000)


def test_plan_without_a_budget_is_the_configuration():
    plan = propose(235_000, 130_000)
    assert (plan.n_buckets, plan.n_repetitions, plan.hidden) == (Config().n_buckets(235_000), 8, WIDTH) == (4096, 8, 512)
    assert plan.hashed == ensemble_cost(n_labels=235_000, n_buckets=4096, n_repetitions=8, hidden=512, n_features=130_000)
    assert plan.full == full_cost(n_labels=235_000, hidden=512, n_features=130_000)
    assert plan.failure_probability == failure_probability(235_000, 4096, 8)
    assert (plan.collisions_one, plan.collisions_all) == expected_collisions(235_000, 4096, 8)


def test_a_strict_delta_raises_the_repetitions():
    assert propose(235_000, delta=1e-30).n_repetitions == repetitions_for(235_000, 4096, 1e-30) > 8


@pytest.mark.parametrize(
    ("memory_bytes", "sizes"),
    [
        # bytes of (B, R, D) without features: 12 R (D + B D + B) for the weights, 2 R K for the table
        (205_528_960, (4096, 8, 512)),
        (205_528_959, (4096, 8, 256)),
        (16_739_200, (4096, 8, 32)),  # the width is given up first
        (16_739_199, (4096, 7, 32)),  # then repetitions
        (8_369_600, (4096, 4, 32)),
        (8_369_599, (2048, 4, 32)),  # then buckets
        (5_125_567, (1024, 5, 32)),
    ],
)
def test_plan_shrinks_in_the_stated_order(memory_bytes, sizes):
    plan = propose(235_000, memory_bytes=memory_bytes)
    assert (plan.n_buckets, plan.n_repetitions, plan.hidden) == sizes
    assert plan.hashed.training_bytes <= memory_bytes


@given(st.integers(2, 2**40), st.integers(0, 10**6), st.integers(10**4, 10**13), st.sampled_from([0.5, 0.01, 1e-9]))
def test_every_plan_fits_and_keeps_the_promise(n_labels, n_features, memory_bytes, delta):
    try:
        plan = propose(n_labels, n_features, memory_bytes, delta)
    except ConfigError as error:
        assert "is too little" in str(error)
        return
    assert plan.hashed.training_bytes <= memory_bytes
    assert plan.failure_probability <= delta * (1 + 1e-6)
    assert 2 <= plan.n_buckets <= n_labels and 1 <= plan.n_repetitions


def test_a_budget_that_nothing_fits_names_the_smallest():
    with pytest.raises(
        ConfigError, match=r"memory=1000 bytes is too little: the smallest sizes for 235000 labels take (\d+) bytes"
    ) as e:
        propose(235_000, memory_bytes=1000)
    smallest = int(str(e.value).split(" take ")[1].split()[0])
    assert smallest == 12 * 6 * (32 + 128 * 33) + 6 * 235_000  # B = 128, R = 6: fewer buckets ask for one more row of the table
    assert propose(235_000, memory_bytes=smallest).hashed.training_bytes == smallest


def test_no_fewer_than_16_buckets_are_proposed():
    smallest = 12 * 5 * (32 + 16 * 33) + 5 * 64  # B = 16, R = 5
    assert propose(64, memory_bytes=smallest).n_buckets == 16
    with pytest.raises(ConfigError, match=f"take {smallest} bytes"):
        propose(64, memory_bytes=smallest - 1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: repetitions_for(10, 1, 0.1), r"n_buckets=1 must lie in \[2, 10\]"),
        (lambda: repetitions_for(10, 11, 0.1), r"n_buckets=11 must lie in \[2, 10\]"),
        (lambda: repetitions_for(10, 2, 0), r"delta=0 must lie in \(0, 1\)"),
        (lambda: repetitions_for(10, 2, 1.0), r"delta=1.0 must lie in \(0, 1\)"),
        (lambda: failure_probability(10, 2, 0), "n_repetitions=0 must be 1 or more"),
        (lambda: expected_collisions(10, 20, 1), r"n_buckets=20 must lie in \[2, 10\]"),
        (
            lambda: ensemble_cost(n_labels=10, n_buckets=2, n_repetitions=0, hidden=2, n_features=2),
            "n_repetitions=0 must be 1 or more",
        ),
        (lambda: propose(1), r"n_labels=1 must lie in \[2, 1099511627776\]"),
        (lambda: propose(2**40 + 1), r"n_labels=1099511627777 must lie in"),
        (lambda: propose(10, hidden=0), "hidden=0 must be 1 or more"),
        (lambda: propose(10, delta=2), r"delta=2 must lie in \(0, 1\)"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ConfigError, match=message):
        call()
