"""Inverse: a table as a kernel sees it, label -> bucket and bucket -> labels, for every row.

A Carter-Wegman table needs no memory for either: a bucket's labels are an arithmetic progression mod p. The other families hold
their buckets, R K small integers, and the labels sorted by bucket, 4 R K bytes (8 if K is above 2**32).

Axes: K labels, B buckets, R repetitions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mach.kernels import jit

MAX_PRIME = 2**32  # below it a k + b fits a word

Words = npt.NDArray[np.uint64]


class Inverse(NamedTuple):
    """Both directions of a table; the arrays of the way not taken are empty."""

    n_labels: int
    n_buckets: int
    is_arithmetic: bool
    p: np.uint64
    a_R: Words  # bucket = ((a k + b) mod p) mod B
    b_R: Words
    back_R: Words  # a**-1 mod p
    step_R: Words  # B a**-1 mod p, from a label of a bucket to the next
    table_RK: npt.NDArray[np.unsignedinteger[Any]]
    starts_RB: npt.NDArray[np.int64]  # (R, B + 1)
    ids_RK: npt.NDArray[np.unsignedinteger[Any]]  # the labels of bucket b are ids[r, starts[r, b] : starts[r, b + 1]]


@jit
def bucket_of(inverse: Inverse, row: int, label: int) -> int:
    """Give the bucket of a label."""
    if inverse.is_arithmetic:
        return np.int64((inverse.a_R[row] * np.uint64(label) + inverse.b_R[row]) % inverse.p % np.uint64(inverse.n_buckets))
    return np.int64(inverse.table_RK[row, label])


@jit
def first_of_progression(
    bucket: np.uint64, p: np.uint64, b: np.uint64, back: np.uint64, n_buckets: np.uint64
) -> tuple[np.uint64, int]:
    """Give the first label of a bucket and how many there are; add `step` mod p for the next.

    It is a**-1 (bucket - b) mod p, and as many as residues bucket + i B below p. Labels of K or more, fewer than p - K, are none.
    """
    label = back * ((bucket + (p - b)) % p) % p
    return label, np.int64((p - bucket + n_buckets - np.uint64(1)) // n_buckets)
