"""Expected calibration error and Brier score: against loops over sorted pairs, fed in any pieces and order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.errors import ConfigError, DataError
from mach.reliability import CELLS, Bin, Reliability

pairs = st.lists(st.tuples(st.floats(0, 1) | st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.booleans()), min_size=1, max_size=60)


def reliability(*parts):
    found = Reliability()
    for part in parts:
        found.update([p for p, _ in part], [y for _, y in part])
    return found


def slow_ece(each, n_bins):
    """Sort the pairs, cut them into bins of equal mass without cutting a cell, and add up the gaps."""
    cell = lambda p: min(int(p * CELLS), CELLS - 1)  # noqa: E731
    bins = [[] for _ in range(n_bins)]
    n_before = 0
    for c in sorted({cell(p) for p, _ in each}):
        members = [(p, y) for p, y in each if cell(p) == c]
        middle = n_before + len(members) / 2
        bins[min(int(middle * n_bins / len(each)), n_bins - 1)] += members
        n_before += len(members)
    return sum(abs(sum(p for p, _ in members) - sum(y for _, y in members)) for members in bins) / len(each)


@given(pairs, st.integers(1, 20), st.randoms())
def test_it_is_the_slow_one_in_any_order_and_pieces(each, n_bins, random):
    found, mixed = reliability(each), random.sample(each, len(each))
    assert found.ece(n_bins) == pytest.approx(slow_ece(each, n_bins), abs=1e-12)
    assert found.brier() == pytest.approx(sum((p - y) ** 2 for p, y in each) / len(each), abs=1e-12)
    again = reliability(mixed[:5], mixed[5:])
    assert (again.ece(n_bins), again.brier()) == pytest.approx((found.ece(n_bins), found.brier()), abs=1e-12)
    assert found.ece(n_bins) <= 1 and sum(b.n for b in found.table()) == len(each)


def test_by_hand():
    each = [(0.9, True), (0.9, True), (0.9, False), (0.1, False)]
    assert reliability(each).ece(2) == pytest.approx((0.7 + 0.1) / 4)
    assert reliability(each).brier() == pytest.approx((0.01 + 0.01 + 0.81 + 0.01) / 4)
    assert reliability(each).table(2) == [
        Bin(1, pytest.approx(0.1), 0.0),
        Bin(3, pytest.approx(0.9), pytest.approx(2 / 3)),
    ]
    assert [b.n for b in reliability([(0.0, False), (0.05, False), (0.95, True), (1.0, True)]).table()] == [2, 2]


def test_outcomes_of_their_probabilities_have_no_error():
    """Drawn from the probabilities themselves: the gap of a bin of n has a standard deviation of at most sqrt(n) / 2."""
    rng = np.random.default_rng(0)
    p = rng.random(40_000)
    found = Reliability()
    found.update(p, rng.random(40_000) < p)
    assert found.ece() < 15 * 3 * math.sqrt(40_000 / 15) / 2 / 40_000 and found.brier() == pytest.approx(1 / 6, abs=0.01)
    found.update(p, np.ones(40_000, bool))
    assert found.ece() > 0.2


def test_what_cannot_be_measured_is_named():
    found = Reliability()
    for measure in (found.ece, found.brier):
        with pytest.raises(DataError, match="there are no probabilities to measure: is the split empty"):
            measure()
    for p in (-0.1, 1.1, math.nan):
        with pytest.raises(ConfigError, match=r"probabilities must lie in \[0, 1\]: are these scores\?"):
            found.update([0.5, p], [True, False])
    with pytest.raises(ConfigError, match=r"probabilities of shape \(2,\) beside outcomes of shape \(1,\)"):
        found.update([0.5, 0.5], [True])
    assert found.n == 0
