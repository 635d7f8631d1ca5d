"""The rows whose products with a sample are largest, of very many: those that share its rarest features are looked at, no others.

The rows are turned round: a list of (row, value) for each feature. A sample opens the lists of its features, the shortest
first, as long as there are no more than so many entries in all; so a sample costs the same however many rows there are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import scipy.sparse as sp

from mach.data import CSR
from mach.data.csr import read_only
from mach.decoding.rerank.linear import ROWS_A_TASK, SparseWeights
from mach.kernels import float_of, jit_ieee, over_rows

Array = npt.NDArray[np.generic]
ENTRIES = 1 << 16  # read for a sample: a quarter of that costs a hundredth of what is found, see experiments/accuracy
ALL_FROM = 2.0  # rows a list entry that is read, up to which all sums are looked at afterwards, instead of those that were met
BLOCK = 64  # sums whose largest is compared first


@dataclass(frozen=True, slots=True, eq=False)
class Nearest:
    """S sparse rows by feature: indptr int64 (F + 1,), rows int32 and values uint16 (nnz,), bits of bfloat16."""

    indptr: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint16]
    n_rows: int

    @classmethod
    def of(cls, weights: SparseWeights) -> Nearest:
        """Turn rows round; biases are left out."""
        shape = (len(weights.bias), weights.n_features)
        turned = sp.csr_array((weights.values, weights.features, weights.indptr), shape=shape).tocsc()
        return cls(turned.indptr.astype(np.int64), turned.indices.astype(np.int32), turned.data, shape[0])

    def find(
        self, features: CSR, n: int, besides_N: npt.NDArray[np.int64] | None = None, *, entries: int = ENTRIES
    ) -> npt.NDArray[np.int64]:
        """Give the n rows of the largest products with each sample, best first, ties by the smaller number: int64 (N, n).

        Only those of a product above zero; -1 stands where there are no more.

        Args: n, at least 1; besides, (N,), a row that each sample is not to find, for it is itself; entries, read for a sample at
              most.
        """
        out = np.full((len(features), n), -1, np.int64)
        values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
        besides = np.full(len(features), -1) if besides_N is None else besides_N
        arrays = (features.indptr, features.indices, values, self.indptr, self.rows, self.values, besides)
        fixed = [read_only(array) for array in arrays]
        over_rows(_find, (*fixed, self.n_rows, entries, ALL_FROM, out), len(features), a_task=ROWS_A_TASK)
        return out


@jit_ieee
def _find(
    indptr: Array, indices: Array, values: Array, list_indptr: Array, list_rows: Array, list_values: Array, besides_N: Array,
    n_rows: int, entries: int, all_from: float, out_Nn: Array, low: int, high: int,
) -> None:  # fmt: skip
    """Find for the samples [low, high): sum up the lists, then look at all sums, or at those that the lists have met."""
    n = out_Nn.shape[1]
    sums, met = np.zeros(-(-n_rows // BLOCK) * BLOCK, np.float32), np.empty(max(n_rows, entries), np.int32)
    best = np.empty(n, np.float32)
    for sample in range(low, high):
        begin, end = indptr[sample], indptr[sample + 1]
        lengths = np.empty(end - begin, np.int64)
        for i in range(begin, end):
            lengths[i - begin] = list_indptr[indices[i] + 1] - list_indptr[indices[i]]
        order, n_opened, n_read = np.argsort(lengths), 0, 0
        while n_opened < len(order) and (n_opened == 0 or n_read + lengths[order[n_opened]] <= entries):
            n_read += lengths[order[n_opened]]
            n_opened += 1
        looks_at_all, n_met = all_from * n_read >= n_rows, 0
        for at in order[:n_opened]:
            value, first, last = values[begin + at], list_indptr[indices[begin + at]], list_indptr[indices[begin + at] + 1]
            if looks_at_all:
                for j in range(first, last):
                    sums[list_rows[j]] += value * float_of(list_values[j])
            else:
                for j in range(first, last):
                    row = list_rows[j]
                    met[n_met] = row
                    n_met += sums[row] == 0  # no branch, which none could foresee; again where a sum has come back to zero
                    sums[row] += value * float_of(list_values[j])
        if besides_N[sample] >= 0:
            sums[besides_N[sample]] = 0
        n_found, least = 0, np.float32(0)
        if looks_at_all:
            for first in range(0, len(sums), BLOCK):
                most = np.float32(0)
                for row in range(first, first + BLOCK):
                    most = sums[row] if sums[row] > most else most
                if most > least:
                    for row in range(first, first + BLOCK):
                        if sums[row] > least:
                            n_found, least = insert(row, sums[row], out_Nn[sample], best, n_found)
            sums[:] = 0
        else:
            for i in range(n_met):
                row = met[i]
                total = sums[row]
                sums[row] = 0
                if total > 0 and total >= least:
                    n_found, least = insert(row, total, out_Nn[sample], best, n_found)


@jit_ieee
def insert(
    row: int, total: np.float32, rows_n: npt.NDArray[np.int64], best_n: npt.NDArray[np.float32], n_found: int
) -> tuple[int, np.float32]:  # fmt: skip
    """Put a row in its place among those found, unless n are as good; give how many there are, and what is to be surpassed."""
    at, n = n_found, len(rows_n)
    if n_found == n:
        at = n - 1
        if total == best_n[at] and row > rows_n[at]:
            return n, best_n[at]
    while at > 0 and (best_n[at - 1] < total or (best_n[at - 1] == total and rows_n[at - 1] > row)):
        best_n[at], rows_n[at] = best_n[at - 1], rows_n[at - 1]
        at -= 1
    best_n[at], rows_n[at] = total, row
    n_found = min(n, n_found + 1)
    return n_found, best_n[n - 1] if n_found == n else np.float32(0)
