"""The prototype of a label: the direction of the sum of its samples, each scaled to length 1; its product with one is a cosine.

A label of few samples tells an SVM little; the mean of its samples is a fair guess at it. Prototypes are weights whose margins
are these cosines.

Source: Rocchio 1971, Relevance feedback in information retrieval, in The SMART Retrieval System.
"""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from mach.data import CSR
from mach.decoding.rerank.fit import SMALLEST, TASKS_A_THREAD, all_positives, scales_of
from mach.decoding.rerank.linear import SparseWeights
from mach.kernels import N_THREADS, bits_of, in_threads, jit_ieee

Array = npt.NDArray[np.generic]


def fit_prototypes(features: CSR, labels: CSR, used_N: npt.NDArray[np.bool_]) -> tuple[SparseWeights, npt.NDArray[np.int32]]:
    """Give the prototypes of K labels from the used ones of N samples, without weights near zero, and how many samples each has.

    Zeros where a label has none, and no biases.

    Holds 4 bytes a positive, and 16 a feature and thread.
    """
    indptr, indices, values, scales = scales_of(features)
    samples, starts = all_positives(labels, used_N)
    at = np.searchsorted(starts, np.linspace(0, starts[-1], TASKS_A_THREAD * N_THREADS + 1)[1:-1])
    cuts = list(itertools.pairwise(sorted({0, *np.minimum(at, labels.n_columns).tolist(), labels.n_columns})))
    parts: list[tuple[Array, ...]] = [()] * len(cuts)

    def solve(i: int) -> None:
        parts[i] = _sums(indptr, indices, values, scales, features.n_columns, samples, starts, *cuts[i], SMALLEST)

    in_threads(solve, [(i,) for i in range(len(cuts))], N_THREADS)
    ends = np.zeros(labels.n_columns + 1, np.int64)
    np.cumsum(np.concatenate([counts for counts, _, _ in parts]), out=ends[1:])
    found, bits = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
    found_weights = SparseWeights(ends, found, bits, np.zeros(labels.n_columns, np.float32), features.n_columns)
    return found_weights, np.diff(starts).astype(np.int32)


@jit_ieee
def _sums(
    indptr: Array, indices: Array, values: Array, scales: Array, n_features: int, samples: Array, starts: Array, low: int,
    high: int, smallest: float,
) -> tuple[Array, Array, Array]:  # fmt: skip
    """Sum the samples of the labels [low, high), scale the sums to length 1; give entries a label, their features and values."""
    sums, last = np.zeros(n_features, np.float32), np.full(n_features, -1)  # the label that a feature was last met for
    counts, size = np.zeros(high - low, np.int64), 0
    features, kept, met = np.empty(1024, np.int32), np.empty(1024, np.uint16), np.empty(n_features, np.int32)
    for label in range(low, high):
        n_met = 0
        for row in samples[starts[label] : starts[label + 1]]:
            for i in range(indptr[row], indptr[row + 1]):
                feature = indices[i]
                if last[feature] != label:
                    last[feature], met[n_met], sums[feature] = label, feature, 0
                    n_met += 1
                sums[feature] += scales[row] * values[i]
        square = 0.0
        for feature in met[:n_met]:
            square += np.float64(sums[feature]) * sums[feature]
        scale, begin = np.float32(1 / np.sqrt(square)) if square > 0 else np.float32(0), size
        for feature in np.sort(met[:n_met]):
            if abs(scale * sums[feature]) >= smallest:
                if size == len(features):
                    features = np.concatenate((features, np.empty(size, np.int32)))
                    kept = np.concatenate((kept, np.empty(size, np.uint16)))
                features[size], kept[size] = feature, bits_of(scale * sums[feature])
                size += 1
        counts[label - low] = size - begin
    return counts, features[:size].copy(), kept[:size].copy()
