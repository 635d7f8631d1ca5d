"""Which buckets are positive most often in training: those whose weights deserve more than the others'."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mach.data import CSR
from mach.hashing import LabelTable

READ = 1 << 22  # labels counted at a time


def slots_of(labels: CSR, table: LabelTable, n_buckets: int, n: int) -> Tensor:
    """Give a place to the n most frequent buckets of each repetition, from 0 in their order; -1 to the others: int32 (R, B).

    A bucket is as frequent as its labels together; ties go to the smaller bucket.
    """
    counts_K = np.zeros(labels.n_columns, np.int64)
    for start in range(0, labels.nnz, READ):
        counts_K += np.bincount(labels.indices[start : start + READ], minlength=labels.n_columns)
    slots = np.full((table.n_repetitions, n_buckets), -1, np.int32)
    for r in range(table.n_repetitions):
        buckets_K = table.buckets(np.arange(labels.n_columns), r)
        counts_B = np.bincount(buckets_K, weights=counts_K, minlength=n_buckets)
        slots[r, np.sort(np.argsort(-counts_B, kind="stable")[:n])] = np.arange(n, dtype=np.int32)
    return torch.from_numpy(slots)
