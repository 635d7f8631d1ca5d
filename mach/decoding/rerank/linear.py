"""Sparse linear weights, a row a label: how well a sample suits each of some labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mach.data import CSR
from mach.data.csr import read_only
from mach.errors import ConfigError
from mach.kernels import float_of, jit_ieee, over_rows

Array = npt.NDArray[np.generic]
ROWS_A_TASK = 256  # samples that one thread scores before it takes more
SEARCH_FROM = 8  # weights of a label for each feature of a sample, from which these are sought instead of all weights visited


@dataclass(frozen=True, slots=True, eq=False)
class SparseWeights:
    """K sparse rows of weights over F features, and a bias each.

    The shapes: indptr int64 (K + 1,); features int32 (nnz,), ascending in a row; values uint16 (nnz,), the bits of bfloat16; bias
    float32 (K,).
    """

    indptr: npt.NDArray[np.int64]
    features: npt.NDArray[np.int32]
    values: npt.NDArray[np.uint16]
    bias: npt.NDArray[np.float32]
    n_features: int

    @property
    def n_parameters(self) -> int:
        """Give the number of weights and biases."""
        return len(self.values) + len(self.bias)

    def margins(self, features: CSR, labels_Nk: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Give the margin of each label for its sample, float32 (N, k); rows of the features are scaled to length 1 here.

        Raises: ConfigError if the samples have another number of features.
        """
        if features.n_columns != self.n_features:
            raise ConfigError(f"the samples have {features.n_columns} features, the second stage was fitted on {self.n_features}")
        out = np.empty(labels_Nk.shape, np.float32)
        values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
        arrays = (features.indptr, features.indices, values, labels_Nk, self.indptr, self.features, self.values, self.bias)
        fixed = [read_only(array) for array in arrays]
        over_rows(_margins, (*fixed, out, self.n_features), len(features), a_task=ROWS_A_TASK)
        return out


@jit_ieee
def _margins(
    indptr: Array, indices: Array, values: Array, labels_Nk: Array, row_indptr: Array, row_features: Array, row_values: Array,
    bias: Array, out_Nk: Array, n_features: int, low: int, high: int,
) -> None:  # fmt: skip
    dense = np.zeros(n_features, np.float32)
    for n in range(low, high):
        square = np.float32(0)
        for i in range(indptr[n], indptr[n + 1]):
            dense[indices[i]] = values[i]
            square += values[i] * values[i]
        scale = np.float32(1) / np.sqrt(square) if square > 0 else np.float32(0)
        for j in range(labels_Nk.shape[1]):
            label = labels_Nk[n, j]
            start, stop = row_indptr[label], row_indptr[label + 1]
            if stop - start > SEARCH_FROM * (indptr[n + 1] - indptr[n]):
                total = _searched(indices, values, indptr[n], indptr[n + 1], row_features, row_values, start, stop)
            else:
                total = np.float32(0)
                for i in range(start, stop):
                    total += float_of(row_values[i]) * dense[row_features[i]]
            out_Nk[n, j] = total * scale + bias[label]
        for i in range(indptr[n], indptr[n + 1]):
            dense[indices[i]] = 0


@jit_ieee
def _searched(
    indices: Array, values: Array, low: int, high: int, row_features: Array, row_values: Array, start: int, stop: int
) -> np.float32:
    """Give the product of a sample and a long row of weights: each feature is sought there. The same sum in the same order."""
    total = np.float32(0)
    for i in range(low, high):
        feature, end = indices[i], stop
        while start < end:
            middle = (start + end) >> 1
            if row_features[middle] < feature:
                start = middle + 1
            else:
                end = middle
        if start == stop:
            break
        if row_features[start] == feature:
            total += float_of(row_values[start]) * values[i]
    return total
