"""Twins: samples of another split that have the very features of a training sample.

Where they have its labels too, a split flatters what learns by heart. Where they have others, as when known answers were left
out of a test split, whatever is learnt of the twin is wrong.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from mach.data.csr import CSR, read_only
from mach.data.dataset import Split
from mach.kernels import jit, mix

MOST = 100  # twins of a sample whose labels are looked at

_Keys = npt.NDArray[np.uint64]
_Array = npt.NDArray[np.generic]


class Twins(NamedTuple):
    """How many samples have a twin in train, and how many of these share no label with one."""

    n: int
    n_strange: int


def count_twins(train: Split, other: Split) -> Twins:
    """Count the samples of another split whose features, if they have any, are those of a training sample, values and all.

    Of dense features, none are counted. Holds 24 bytes a training sample, 8 a sample of the other split.
    """
    if not isinstance(train.features, CSR) or not isinstance(other.features, CSR):
        return Twins(0, 0)
    keys_N, ours_N = _keys(train.features), _keys(other.features)
    order_N = np.argsort(keys_N, kind="stable")
    arrays = (train.labels.indptr, train.labels.indices, other.labels.indptr, other.labels.indices, other.features.indptr)
    return Twins(*_count(keys_N[order_N], order_N, ours_N, *(read_only(array) for array in arrays)))


def _keys(features: CSR) -> _Keys:
    """Give each row 64 bits of its features and their values: rows of like bits are taken for the same."""
    keys_N = np.empty(len(features), np.uint64)
    values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    _fill(read_only(features.indptr), read_only(features.indices), read_only(bits), keys_N)
    return keys_N


@jit
def _fill(indptr: _Array, indices: _Array, bits: _Array, keys_N: _Keys) -> None:
    for n in range(len(keys_N)):
        key = np.uint64(0)
        for i in range(indptr[n], indptr[n + 1]):
            key = mix(key ^ (np.uint64(indices[i]) << np.uint64(32) | np.uint64(bits[i])))
        keys_N[n] = key


@jit
def _count(
    sorted_N: _Keys, order_N: _Array, ours_N: _Keys, indptr: _Array, indices: _Array, our_indptr: _Array, our_indices: _Array,
    starts: _Array,
) -> tuple[int, int]:  # fmt: skip
    n_twins, n_strange = 0, 0
    for n in range(len(ours_N)):
        at = np.searchsorted(sorted_N, ours_N[n])
        if starts[n] == starts[n + 1] or at == len(sorted_N) or sorted_N[at] != ours_N[n]:
            continue
        n_twins += 1
        shares = False
        for twin in range(at, min(at + MOST, len(sorted_N))):
            if sorted_N[twin] != ours_N[n]:
                break
            row = order_N[twin]
            for i in range(indptr[row], indptr[row + 1]):
                for j in range(our_indptr[n], our_indptr[n + 1]):
                    shares |= indices[i] == our_indices[j]
        n_strange += not shares
    return n_twins, n_strange
