"""The labels whose weights suit a sample best, of all K: those that share its rarest features are looked at, and no others.

The weights are turned round: a list of (label, weight) for each feature. A sample opens the lists of its features, the shortest
first, as long as there are no more than ENTRIES in all; so a sample costs the same however many labels there are.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from mach.data import CSR
from mach.data.csr import read_only
from mach.decoding.only import Only, allowed_of, no_lists
from mach.decoding.rerank.linear import ROWS_A_TASK, SparseWeights
from mach.kernels import N_THREADS, float_of, in_threads, jit_ieee

Array = npt.NDArray[np.generic]
ENTRIES = 1 << 16  # read for a sample: a quarter of that costs a hundredth of what is found, see experiments/accuracy
ALL_FROM = 2.0  # labels a list entry that is read, up to which all sums are looked at afterwards, instead of those that were met
BLOCK = 64  # sums whose largest is compared first


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """Sparse weights of K labels by feature: indptr int64 (F + 1,), labels int32 and values uint16 (nnz,), bits of bfloat16."""

    indptr: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint16]
    n_labels: int

    @classmethod
    def of(cls, weights: SparseWeights) -> Nearest:
        """Turn weights round; biases are left out."""
        shape = (len(weights.bias), weights.n_features)
        turned = sp.csr_array((weights.values, weights.features, weights.indptr), shape=shape).tocsc()
        return cls(turned.indptr.astype(np.int64), turned.indices.astype(np.int32), turned.data, shape[0])

    def find(self, features: CSR, n: int, besides_Nm: npt.NDArray[np.int64], only: Only | None = None) -> npt.NDArray[np.int64]:
        """Give the n labels of the largest products with each sample, best first, ties by the smaller id: int64 (N, n).

        Only those of a product above zero; -1 stands where there are no more.

        Args: besides, (N, m), labels that each sample is not to find, for it has them; only, which labels may be found.
        """
        out = np.full((len(features), n), -1, np.int64)
        values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
        if n == 0:
            return out
        only = only or Only(*no_lists(len(features)), allowed_of(None, self.n_labels))
        arrays = (features.indptr, features.indices, values, self.indptr, self.labels, self.values, besides_Nm, *only)
        cuts = [*range(0, len(features), ROWS_A_TASK), len(features)]
        fixed = [read_only(array) for array in arrays]
        tasks = [(*fixed, self.n_labels, ENTRIES, ALL_FROM, out, low, high) for low, high in itertools.pairwise(cuts)]
        in_threads(_find, tasks, N_THREADS)
        return out


@jit_ieee
def _find(
    indptr: Array, indices: Array, values: Array, list_indptr: Array, list_labels: Array, list_values: Array, besides_Nm: Array,
    starts: Array, without: Array, allowed: Array, n_labels: int, entries: int, all_from: float, out_Nn: Array,
    low: int, high: int,
) -> None:  # fmt: skip
    """Find for the samples [low, high): sum up the lists, then look at all sums, or at those that the lists have met."""
    n = out_Nn.shape[1]
    sums, met = np.zeros(-(-n_labels // BLOCK) * BLOCK, np.float32), np.empty(max(n_labels, entries), np.int32)
    best = np.empty(n, np.float32)
    for row in range(low, high):
        begin, end = indptr[row], indptr[row + 1]
        lengths = np.empty(end - begin, np.int64)
        for i in range(begin, end):
            lengths[i - begin] = list_indptr[indices[i] + 1] - list_indptr[indices[i]]
        order, n_opened, n_read = np.argsort(lengths), 0, 0
        while n_opened < len(order) and (n_opened == 0 or n_read + lengths[order[n_opened]] <= entries):
            n_read += lengths[order[n_opened]]
            n_opened += 1
        looks_at_all, n_met = all_from * n_read >= n_labels, 0
        for at in order[:n_opened]:
            value, first, last = values[begin + at], list_indptr[indices[begin + at]], list_indptr[indices[begin + at] + 1]
            if looks_at_all:
                for j in range(first, last):
                    sums[list_labels[j]] += value * float_of(list_values[j])
            else:
                for j in range(first, last):
                    label = list_labels[j]
                    met[n_met] = label
                    n_met += sums[label] == 0  # no branch, which none could foresee; again where a sum has come back to zero
                    sums[label] += value * float_of(list_values[j])
        for label in besides_Nm[row]:
            sums[label] = 0
        for label in without[starts[row] : starts[row + 1]]:
            sums[label] = 0
        n_found, least = 0, np.float32(0)
        if looks_at_all:
            for first in range(0, len(sums), BLOCK):
                most = np.float32(0)
                for label in range(first, first + BLOCK):
                    most = sums[label] if sums[label] > most else most
                if most > least:
                    for label in range(first, first + BLOCK):
                        if sums[label] > least and (len(allowed) == 0 or allowed[label]):
                            n_found, least = _insert(label, sums[label], out_Nn[row], best, n_found)
            sums[:] = 0
        else:
            for i in range(n_met):
                label = met[i]
                total = sums[label]
                sums[label] = 0
                if total > 0 and total >= least and (len(allowed) == 0 or allowed[label]):
                    n_found, least = _insert(label, total, out_Nn[row], best, n_found)


@jit_ieee
def _insert(
    label: int, total: np.float32, labels_n: npt.NDArray[np.int64], best_n: npt.NDArray[np.float32], n_found: int
) -> tuple[int, np.float32]:  # fmt: skip
    """Put a label in its place among those found, unless n are as good; give how many there are, and what is to be surpassed."""
    at, n = n_found, len(labels_n)
    if n_found == n:
        at = n - 1
        if total == best_n[at] and label > labels_n[at]:
            return n, best_n[at]
    while at > 0 and (best_n[at - 1] < total or (best_n[at - 1] == total and labels_n[at - 1] > label)):
        best_n[at], labels_n[at] = best_n[at - 1], labels_n[at - 1]
        at -= 1
    best_n[at], labels_n[at] = total, label
    n_found = min(n, n_found + 1)
    return n_found, best_n[n - 1] if n_found == n else np.float32(0)
