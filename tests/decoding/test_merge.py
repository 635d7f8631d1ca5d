"""The k best of parts of the labels, merged, are the k best of all of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mach.comm import part_of
from mach.decoding.merge import merge_topk, padded
from mach.decoding.reference import topk
from mach.decoding.topk import NO_LABEL, TopK, topk_identity
from mach.errors import ConfigError


@given(st.integers(0, 5), st.integers(1, 30), st.integers(1, 7), st.booleans(), st.integers(0, 2**32), st.data())
def test_the_merged_are_the_best_of_all(N, K, P, is_tied, seed, data):
    P, k = min(P, K), data.draw(st.integers(1, K))
    rng = np.random.default_rng(seed)
    scores_NK = (rng.integers(-1, 2, (N, K)) if is_tied else rng.normal(size=(N, K))).astype(np.float32)
    parts = []
    for part in (part_of(K, rank, P) for rank in range(P)):
        best = topk_identity(np.ascontiguousarray(scores_NK[:, part.start : part.stop]), min(k, len(part)))
        parts.append(padded(TopK(best.labels + part.start, best.scores), k))
        assert parts[-1].labels.shape == parts[-1].scores.shape == (N, k)
    found = merge_topk([parts[i] for i in rng.permutation(P)], k)
    assert found.labels.dtype == np.int64 and found.scores.dtype == np.float32
    for n in range(N):
        assert found.labels[n].tolist() == topk(scores_NK[n].tolist(), k)
        assert found.scores[n].tolist() == scores_NK[n, found.labels[n]].tolist()


def test_more_than_the_parts_found_is_refused():
    part = padded(TopK(np.array([[3], [4]]), np.array([[1], [2]], np.float32)), 2)
    assert part.labels.tolist() == [[3, NO_LABEL], [4, NO_LABEL]] and part.scores.tolist() == [[1, -np.inf], [2, -np.inf]]
    with pytest.raises(ConfigError, match=r"^k=2 must lie in \[1, 1\]"):
        merge_topk([part], 2)
    with pytest.raises(ConfigError, match=r"^k=0 must lie in \[1, 1\]"):
        merge_topk([part], 0)
