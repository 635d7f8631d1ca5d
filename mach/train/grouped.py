"""The label table that a group of repetitions trains with: hashed, or, in a share of the repetitions, learnt from the data."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp

from mach.config import Config
from mach.data import CSR, Dataset, take, take_rows
from mach.hashing import LabelTable
from mach.hashing.grouping import LabelSums, group_labels, is_grouped
from mach.packed import Sizes
from mach.train.loop import HELD_OUT, n_held_out
from mach.train.schedule import order_of

BLOCK = 8192  # samples read at a time


def with_groups(table: LabelTable, config: Config, sizes: Sizes, dataset: Dataset) -> LabelTable:
    """Give a table in which the repetitions that `config.grouped` says have buckets learnt from the samples they train on.

    A function of data, config and the repetition's number; the data are read once for the labels' counts and once a repetition.
    """
    share = config.share_grouped(sizes.n_labels, sizes.labels_a_sample)
    numbers = [r for r in table.repetitions if is_grouped(r, share)]
    if not numbers:
        return table
    train, n_held = dataset.split("train"), n_held_out(config, dataset)
    blocks = [slice(i, min(i + BLOCK, train.n_samples)) for i in range(n_held, train.n_samples, BLOCK)]

    def rows_of(block: slice) -> np.ndarray:
        places = np.arange(block.start, block.stop)
        return order_of(train.n_samples, config.seed, HELD_OUT, places) if n_held else places

    counts_K = np.zeros(table.n_labels, np.int64)
    for block in blocks:
        counts_K += np.bincount(take_rows(train.labels, rows_of(block)).indices, minlength=table.n_labels)
    given = {}
    for r in numbers:
        sums = LabelSums(counts_K, seed=config.seed, repetition=r)
        for block in blocks:
            x, y = _sparse(take(train.features, rows_of(block))), take_rows(train.labels, rows_of(block))
            values = np.ones(x.nnz, np.float32) if x.values is None else x.values
            sums.add(x.indptr, x.indices, values, y.indptr, y.indices)
        given[r] = group_labels(sums, table.n_buckets, seed=config.seed, repetition=r)
    return table.with_given(given)


def _sparse(features: CSR | np.ndarray) -> CSR:
    return features if isinstance(features, CSR) else CSR.from_scipy(sp.csr_matrix(features))
