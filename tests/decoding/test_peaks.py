"""The best buckets of each repetition, against a sort of all of them."""

from __future__ import annotations

import numpy as np
import pytest

from mach.decoding.peaks import FEW_KEYS, find_best, find_peaks
from mach.decoding.work import scratch


@pytest.mark.parametrize("n_buckets", [1, 31, 33, 1024, 1061, 9_973])
@pytest.mark.parametrize("wanted", [1, 12, 100, 2 * FEW_KEYS])
@pytest.mark.parametrize("spread", [2, 1_000_000])  # many ties, and nearly none
def test_best_buckets_come_in_order_and_bound_the_others(n_buckets, wanted, spread):
    scores_RB = (np.random.default_rng(n_buckets + wanted).integers(spread, size=(3, n_buckets)) / spread - 0.5).astype(
        np.float32
    )
    work, wanted = scratch(3, n_buckets, 64, 10), min(wanted, n_buckets)
    find_peaks(scores_RB, work.peaks_RM)
    find_best(scores_RB, wanted, work)
    for r, row_B in enumerate(scores_RB):
        n, order = work.n_R[r], np.lexsort((np.arange(n_buckets), -row_B))
        assert work.buckets_RB[r, :n].tolist() == order[:n].tolist()
        assert work.scores_RB[r, :n].tolist() == row_B[order[:n]].tolist()
        assert work.best_R[r] == row_B.max()
        assert (row_B[order[n:]] <= work.below_R[r]).all()
        if spread > n_buckets:
            assert n >= min(wanted, n_buckets - 1)
