"""Groups of look-alikes: samples so much alike that one of them in train gives the others away in dev.

    features of a sample -> the first of them in each of BANDS x ROWS random orders -> a key a band (N,)
    samples of equal keys joined, and those joined to these -> groups (N,)

A feature counts by its squared value and the log of how rare it is; the heavier, the likelier it is to come first. Two samples
have the same first feature with about the chance J, their weighted Jaccard similarity, and share a key with that of
1 - (1 - J^ROWS)^BANDS: 0.00 at J = 0.2, 0.22 at 0.5, 0.87 at 0.7 and 0.99 at 0.8.
Source: Moulton & Jiang 2018, arXiv:1809.04052 (first features by exponential clocks); Broder 1997, SEQUENCES (resemblance of
documents); Indyk & Motwani 1998, STOC (bands).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.data.csr import CSR, Floats, Ints, read_only
from mach.kernels import jit, mix, over_rows

BANDS = 16
ROWS = 6  # orders of a band
_ROWS_A_TASK = 1024  # samples

_Keys = npt.NDArray[np.uint64]


def alike_groups(features: CSR) -> Ints:
    """Give each sample the least row of those it is joined to, by one look-alike or a chain of them: int64 (N,).

    Samples without a feature that others lack are alone. Holds 136 bytes a sample, and 8 a feature.
    """
    n = len(features)
    counts_F = np.bincount(features.indices, minlength=features.n_columns)
    rarity_F = np.log(n / np.maximum(counts_F, 1))
    values = np.ones(len(features.indices), np.float32) if features.values is None else features.values
    keys_WN = np.empty((BANDS, n), np.uint64)
    arrays = [read_only(array) for array in (features.indptr, features.indices, values, rarity_F)]
    over_rows(_keys_of, (*arrays, keys_WN), n, a_task=_ROWS_A_TASK)
    least_N = np.arange(n)
    for keys_N in keys_WN:
        _join(np.argsort(keys_N, kind="stable"), keys_N, least_N)
    _flatten(least_N)
    return least_N


@jit
def _keys_of(
    indptr: Ints,
    indices: npt.NDArray[Any],
    values: Floats,
    rarity_F: npt.NDArray[np.float64],
    keys_WN: _Keys,
    low: int,
    high: int,
) -> None:
    soonest, first = np.empty(BANDS * ROWS), np.empty(BANDS * ROWS, np.uint64)
    for n in range(low, high):
        soonest[:] = np.inf
        first[:] = mix(np.uint64(n))  # nobody else's: two samples without features are not alike
        for i in range(indptr[n], indptr[n + 1]):
            weight = np.float64(values[i]) ** 2 * rarity_F[indices[i]]
            if weight > 0:
                feature = mix(~np.uint64(indices[i]))
                for j in range(len(first)):
                    bits = mix(feature + np.uint64(j + 1) * np.uint64(0x9E3779B97F4A7C15))
                    share = (float(bits >> np.uint64(11)) + 0.5) / 2.0**53
                    if 1 - share < soonest[j] * weight:  # a bound of the logarithm, which is rarely needed
                        time = -math.log(share) / weight
                        if time < soonest[j]:
                            soonest[j], first[j] = time, feature
        for band in range(BANDS):
            key = np.uint64(band)
            for j in range(ROWS):
                key = mix(key ^ first[band * ROWS + j])
            keys_WN[band, n] = key


@jit
def _root(least_N: Ints, n: int) -> int:
    while least_N[n] != n:
        least_N[n] = least_N[least_N[n]]
        n = least_N[n]
    return n


@jit
def _join(order_N: Ints, keys_N: _Keys, least_N: Ints) -> None:
    """Join neighbours of an order by keys whose keys are equal."""
    for i in range(1, len(order_N)):
        if keys_N[order_N[i - 1]] == keys_N[order_N[i]]:
            a, b = _root(least_N, order_N[i - 1]), _root(least_N, order_N[i])
            least_N[max(a, b)] = min(a, b)


@jit
def _flatten(least_N: Ints) -> None:
    for n in range(len(least_N)):
        least_N[n] = _root(least_N, n)
