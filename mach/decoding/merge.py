"""The k best of all labels from the k best of each part of them: nothing else of a part needs to be sent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mach.decoding.topk import NO_LABEL, TopK, check_k


def merge_topk(parts: Sequence[TopK], k: int) -> TopK:
    """Give the k best labels of each sample of those that parts found, best first, ties by the smaller label id.

    They are the k best of all labels if each label is in one part, and each part gave its k best, or all that it has. Scores are
    finite; a place that a part could not fill holds NO_LABEL and a score of -inf (`padded`).

    Raises: ConfigError if k is below 1 or above what the parts found together.
    """
    labels, scores = np.concatenate([p.labels for p in parts], 1), np.concatenate([p.scores for p in parts], 1)
    check_k(k, int((labels != NO_LABEL).sum(1).min(initial=labels.shape[1])))
    order = np.lexsort((labels, -scores), axis=1)[:, :k]
    return TopK(np.take_along_axis(labels, order, 1), np.take_along_axis(scores, order, 1))


def padded(found: TopK, k: int) -> TopK:
    """Give the same with k places a sample, so that parts of fewer than k labels have the shape of the others."""
    n_more = k - found.labels.shape[1]
    labels = np.pad(found.labels, ((0, 0), (0, n_more)), constant_values=NO_LABEL)
    return TopK(labels, np.pad(found.scores, ((0, 0), (0, n_more)), constant_values=-np.inf))
