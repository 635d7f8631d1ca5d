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
SMALL_PRIME = 2**26  # below it a k + b fits the 53 bits of a float64

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
    is_small: bool  # p < 2**26: `small_buckets` holds
    small_a_R: npt.NDArray[np.float64]
    small_b_R: npt.NDArray[np.float64]
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


@jit
def small_buckets(
    a_R: npt.NDArray[np.float64],
    b_R: npt.NDArray[np.float64],
    p: float,
    n_buckets: float,
    label: int,
    out_R: npt.NDArray[np.int32],
) -> None:
    """Give a label's bucket in every row, for p < 2**26, several rows at once where `%` takes them one by one.

    a k + b is exact in float64. Its quotient by a product with 1 / p is at most one off, which the remainder shows.
    """
    per_p, per_bucket, k = 1 / p, 1 / n_buckets, float(label)
    for r in range(len(out_R)):
        y = a_R[r] * k + b_R[r]
        y -= np.floor(y * per_p) * p
        y = y + p if y < 0 else y
        y = y - p if y >= p else y
        y -= np.floor(y * per_bucket) * n_buckets
        y = y + n_buckets if y < 0 else y
        y = y - n_buckets if y >= n_buckets else y
        out_R[r] = np.int32(y)
