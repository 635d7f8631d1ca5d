"""The training samples most like a sample vote for their labels.

A prototype averages what a label's samples have in common; a single sample that is nearly the same says more. The votes of the
nearest samples also find labels that decoding has missed.

Source: Cover & Hart 1967, IEEE Transactions on Information Theory 13 (nearest neighbours); Dudani 1976, IEEE Transactions on
Systems, Man, and Cybernetics 6 (nearer ones count for more).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mach.data import CSR, take_rows
from mach.data.csr import read_only
from mach.decoding.only import Only, allowed_of, no_lists
from mach.decoding.rerank.fit import scales_of
from mach.decoding.rerank.linear import ROWS_A_TASK, SparseWeights
from mach.decoding.rerank.nearest import ENTRIES, Nearest, insert
from mach.kernels import bits_of, jit_ieee, over_rows

Array = npt.NDArray[np.generic]
Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]

N_NEIGHBOURS = 100  # of a sample: see experiments/accuracy/networks
SMALLEST = 0.02  # what is nearer to zero in a sample of length 1 is left out


class Found(NamedTuple):
    """The nearest training samples of N samples, (N, M), and their cosines; -1 and 0 where there are no more."""

    rows: Ints
    cosines: Floats


@dataclass(frozen=True, eq=False)
class Neighbours:
    """S training samples, scaled to length 1, and their labels, (S, K)."""

    samples: SparseWeights
    labels: CSR

    @classmethod
    def of(cls, features: CSR, labels: CSR, used_N: npt.NDArray[np.bool_]) -> Neighbours:
        """Keep the used ones of N training samples."""
        used = np.flatnonzero(used_N)
        kept = take_rows(features, used)
        counts, entries, bits = _scaled(*scales_of(kept), SMALLEST)
        starts = np.zeros(len(used) + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        return cls(rows_of(starts, entries, bits, features.n_columns), take_rows(labels, used))

    @functools.cached_property
    def _nearest(self) -> Nearest:
        return Nearest.of(self.samples)

    def find(self, features: CSR, besides_N: Ints | None = None, *, entries: int = ENTRIES) -> Found:
        """Give the nearest training samples, the most like first.

        Args: besides, (N,), the training sample that each sample is itself, which it is not to find; entries, as `Nearest.find`.
        """
        rows = self._nearest.find(features, N_NEIGHBOURS, besides_N, entries=entries)
        cosines = self.samples.margins(features, np.maximum(rows, 0))
        return Found(rows, np.where(rows >= 0, cosines, np.float32(0)))

    def votes(self, found: Found, labels_Nk: Ints) -> Floats:
        """Give the largest cosine to a neighbour with the label, and the share of the votes for it, float32 (N, k, 2).

        A vote is a squared cosine. Zeros for a label of -1.
        """
        out = np.zeros((*labels_Nk.shape, 2), np.float32)
        arrays = (*found, self.labels.indptr, self.labels.indices, labels_Nk)
        self._over_rows(_votes, arrays, out)
        return out

    def near(self, found: Found, n: int, besides_Nm: Ints, only: Only | None = None) -> Ints:
        """Give the n labels of most votes, best first, ties by the smaller id: int64 (N, n), -1 where there are no more.

        Args: besides, (N, m), labels that each sample is not to find, for it has them, -1 is none; only, which may be found.
        """
        out = np.full((len(besides_Nm), n), -1, np.int64)
        if n:
            only = only or Only(*no_lists(len(besides_Nm)), allowed_of(None, self.labels.n_columns))
            self._over_rows(_near, (*found, self.labels.indptr, self.labels.indices, besides_Nm, *only), out)
        return out

    def _over_rows(self, kernel: Callable[..., None], arrays: tuple[Array, ...], out: Array) -> None:
        """Let a kernel fill the rows of `out`."""
        fixed = [read_only(array) for array in arrays]
        over_rows(kernel, (*fixed, self.labels.n_columns, out), len(out), a_task=ROWS_A_TASK)


def rows_of(starts: Ints, features: npt.NDArray[np.int32], values: npt.NDArray[np.uint16], n: int) -> SparseWeights:
    """Give samples as rows whose margins are cosines, over n features."""
    return SparseWeights(starts, features, values, np.zeros(len(starts) - 1, np.float32), n)


@jit_ieee
def _scaled(
    indptr: Array, indices: Array, values: Array, scales: Array, smallest: float
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32], npt.NDArray[np.uint16]]:
    """Scale rows and leave out what is near zero; give entries a row, their features and values."""
    counts, size = np.zeros(len(indptr) - 1, np.int64), 0
    features, kept = np.empty(len(indices), np.int32), np.empty(len(indices), np.uint16)
    for row in range(len(counts)):
        begin = size
        for i in range(indptr[row], indptr[row + 1]):
            if abs(scales[row] * values[i]) >= smallest:
                features[size], kept[size] = indices[i], bits_of(scales[row] * values[i])
                size += 1
        counts[row] = size - begin
    return counts, features[:size].copy(), kept[:size].copy()


@jit_ieee
def _votes(
    rows_NM: Array, cosines_NM: Array, indptr: Array, indices: Array, labels_Nk: Array, n_labels: int, out_Nk2: Array, low: int,
    high: int,
) -> None:  # fmt: skip
    place = np.full(n_labels, -1, np.int32)
    for sample in range(low, high):
        for j in range(labels_Nk.shape[1]):
            if labels_Nk[sample, j] >= 0:
                place[labels_Nk[sample, j]] = j
        total = np.float32(0)
        for m in range(rows_NM.shape[1]):
            row, cosine = rows_NM[sample, m], cosines_NM[sample, m]
            if row < 0:
                break
            total += cosine * cosine
            for i in range(indptr[row], indptr[row + 1]):
                j = place[indices[i]]
                if j >= 0:
                    out_Nk2[sample, j, 0] = max(out_Nk2[sample, j, 0], cosine)
                    out_Nk2[sample, j, 1] += cosine * cosine
        for j in range(labels_Nk.shape[1]):
            if labels_Nk[sample, j] >= 0:
                place[labels_Nk[sample, j]] = -1
                if total > 0:
                    out_Nk2[sample, j, 1] /= total


@jit_ieee
def _near(
    rows_NM: Array, cosines_NM: Array, indptr: Array, indices: Array, besides_Nm: Array, starts: Array, without: Array,
    allowed: Array, n_labels: int, out_Nn: Array, low: int, high: int,
) -> None:  # fmt: skip
    sums, best = np.zeros(n_labels, np.float32), np.empty(out_Nn.shape[1], np.float32)
    for sample in range(low, high):
        n_found, least = 0, np.float32(0)
        for m in range(rows_NM.shape[1]):
            if rows_NM[sample, m] >= 0:
                for i in range(indptr[rows_NM[sample, m]], indptr[rows_NM[sample, m] + 1]):
                    sums[indices[i]] += cosines_NM[sample, m] * cosines_NM[sample, m]
        for label in besides_Nm[sample]:
            if label >= 0:
                sums[label] = 0
        for label in without[starts[sample] : starts[sample + 1]]:
            sums[label] = 0
        for m in range(rows_NM.shape[1]):
            if rows_NM[sample, m] >= 0:
                for i in range(indptr[rows_NM[sample, m]], indptr[rows_NM[sample, m] + 1]):
                    label = indices[i]
                    total = sums[label]
                    sums[label] = 0  # no second time
                    if total > 0 and total >= least and (len(allowed) == 0 or allowed[label]):
                        n_found, least = insert(label, total, out_Nn[sample], best, n_found)
