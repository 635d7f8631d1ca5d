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
        tasks = [(*fixed, self.n_labels, ENTRIES, out, low, high) for low, high in itertools.pairwise(cuts)]
        in_threads(_find, tasks, N_THREADS)
        return out


@jit_ieee
def _find(
    indptr: Array, indices: Array, values: Array, list_indptr: Array, list_labels: Array, list_values: Array, besides_Nm: Array,
    starts: Array, without: Array, allowed: Array, n_labels: int, entries: int, out_Nn: Array, low: int, high: int,
) -> None:  # fmt: skip
    n = out_Nn.shape[1]
    sums, met = np.zeros(n_labels, np.float32), np.empty(max(n_labels, entries), np.int32)
    best = np.empty(n, np.float32)
    for row in range(low, high):
        begin, end = indptr[row], indptr[row + 1]
        lengths = np.empty(end - begin, np.int64)
        for i in range(begin, end):
            lengths[i - begin] = list_indptr[indices[i] + 1] - list_indptr[indices[i]]
        left, n_met = entries, 0
        for place, at in enumerate(np.argsort(lengths)):
            if lengths[at] > left and place > 0:
                break
            left -= lengths[at]
            feature, value = indices[begin + at], values[begin + at]
            for j in range(list_indptr[feature], list_indptr[feature + 1]):
                label = list_labels[j]
                met[n_met] = label
                n_met += sums[label] == 0  # no branch, which none could foresee; again where a sum has come back to zero
                sums[label] += value * float_of(list_values[j])
        for label in besides_Nm[row]:
            sums[label] = 0
        for label in without[starts[row] : starts[row + 1]]:
            sums[label] = 0
        n_found, least = 0, np.float32(0)
        for i in range(n_met):
            label = met[i]
            total = sums[label]
            sums[label] = 0
            if total < least or total <= 0 or (len(allowed) > 0 and not allowed[label]):
                continue
            at = n_found if n_found < n else n - 1
            if n_found == n and total == least and label > out_Nn[row, at]:
                continue
            n_found = min(n, n_found + 1)
            while at > 0 and (best[at - 1] < total or (best[at - 1] == total and out_Nn[row, at - 1] > label)):
                best[at], out_Nn[row, at] = best[at - 1], out_Nn[row, at - 1]
                at -= 1
            best[at], out_Nn[row, at] = total, label
            if n_found == n:
                least = best[n - 1]
