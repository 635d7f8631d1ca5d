"""Tables learnt from data: rare labels whose samples look alike share a bucket, frequent ones are spread.

    samples -> LabelSums.add, a block at a time -> a direction for each rare label (T, d) -> halves of halves -> buckets (K,)

Axes: N samples of a block, F features, K labels, T rare labels, B buckets, d = WIDTH. Beside the table only the directions are
held, 4 T d bytes and once more while they are sorted: neither N x B, F x d nor K x K numbers. All sums are taken in a fixed order
and all that is random comes from (seed, repetition), so a table is the same on every machine.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.hashing.families import Ids
from mach.kernels import jit, jit_ieee, mix

RARE = 32  # a label with fewer samples is rare: too few to be told from the others in its bucket by itself
WIDTH = 256  # d, numbers of a label's direction; a multiple of 64
ROUNDS = 4  # of 2-means in a node
CHOICES = 8  # buckets of which a frequent label takes the least loaded

Floats = npt.NDArray[np.float32]
_Ints = npt.NDArray[np.signedinteger[Any]]


def is_grouped(repetition: int, share: float) -> bool:
    """Tell whether a repetition is one of those that learn tables: a share of all, evenly spread, however many there are."""
    return int((repetition + 1) * share) > int(repetition * share)


class LabelSums:
    """The directions of rare labels: each the sum of its samples' unit features, at random d of their dimensions.

    Source: Prabhu et al. 2018, "Parabel", WWW (labels by the average of their samples); Achlioptas 2003, "Database-friendly
    random projections", J. Comput. Syst. Sci. 66 (dimensions of random signs).
    """

    def __init__(self, counts_K: npt.ArrayLike, *, seed: int, repetition: int):
        self.counts_K = np.asarray(counts_K, np.int64)
        self.is_rare_K = self.counts_K < RARE
        self._key = _key(seed, repetition, "signs")
        self._place_K = np.where(self.is_rare_K, np.cumsum(self.is_rare_K) - 1, -1)
        self._sums_Td = np.zeros((int(self.is_rare_K.sum()), WIDTH), np.float32)

    def add(self, indptr: Ids, features: _Ints, values: Floats, label_indptr: Ids, labels: _Ints) -> None:
        """Add N samples: CSR of features and of labels, int64 (N + 1,) from 0 and what they point into."""
        _add(indptr, features, values, label_indptr, labels, self._place_K, self._key, self._sums_Td)

    def directions(self) -> Floats:
        """Give a vector of length 1 for each rare label, in the order of their ids, (T, d); at random for one without samples."""
        _make_unit(self._sums_Td, self._key)
        return self._sums_Td


def group_labels(sums: LabelSums, n_buckets: int, *, seed: int, repetition: int) -> Ids:
    """Give each label's bucket, int64 (K,): similar rare labels together, frequent ones spread, buckets evenly loaded.

    The load of a bucket is its labels' samples, and one more a label. Frequent labels come first, the most frequent at the front,
    each to the least loaded of a few random buckets (Azar et al. 1999, SIAM J. Comput. 29). Then rare labels fill the buckets up:
    they are cut into halves of directions that differ most, and these again, each as large as its buckets have room.
    """
    order = np.arange(len(sums.counts_K))
    _shuffle(order, _key(seed, repetition, "order"))
    order = order[np.argsort(-sums.counts_K[order], kind="stable")]
    n_rare = int(sums.is_rare_K.sum())
    frequent, rare_T = order[: len(order) - n_rare], np.flatnonzero(sums.is_rare_K)
    table_K, load_B = np.empty(len(order), np.int64), np.zeros(n_buckets, np.int64)
    _spread(frequent, sums.counts_K, _key(seed, repetition, "choices"), table_K, load_B)
    if n_rare:
        room_B = np.maximum(0, -(-int((sums.counts_K + 1).sum()) // n_buckets) - load_B)
        room = int(room_B.sum())
        bounds = np.array([0, *(int(taken) * n_rare // room for taken in np.cumsum(room_B))], np.int64)
        order_T = np.arange(n_rare)
        _shuffle(order_T, _key(seed, repetition, "rare"))
        _bisect(sums.directions(), order_T, bounds, _key(seed, repetition, "halves"))
        table_K[rare_T[order_T]] = np.repeat(np.arange(n_buckets), np.diff(bounds))
    return table_K


def _key(seed: int, repetition: int, what: str) -> np.uint64:
    digest = hashlib.blake2b(f"grouping/{seed}/{repetition}/{what}".encode(), digest_size=8).digest()
    return np.uint64(int.from_bytes(digest, "little"))


@jit
def _drawn(key: np.uint64, i: int) -> np.uint64:
    """Give the i-th of 64 random bits."""
    return mix(key + np.uint64(i + 1) * np.uint64(0x9E3779B97F4A7C15))


@jit
def _shuffle(ids: Ids, key: np.uint64) -> None:
    """Bring ids into a random order (Fisher and Yates)."""
    for i in range(len(ids) - 1, 0, -1):
        j = np.int64(_drawn(key, i) % np.uint64(i + 1))
        ids[i], ids[j] = ids[j], ids[i]


@jit
def _spread(labels: Ids, counts_K: Ids, key: np.uint64, table_K: Ids, load_B: Ids) -> None:
    """Put each label in turn into the least loaded of a few buckets."""
    for i in range(len(labels)):
        best = np.int64(_drawn(key, CHOICES * i) % np.uint64(len(load_B)))
        for j in range(1, CHOICES):
            bucket = np.int64(_drawn(key, CHOICES * i + j) % np.uint64(len(load_B)))
            if load_B[bucket] < load_B[best]:
                best = bucket
        table_K[labels[i]] = best
        load_B[best] += counts_K[labels[i]] + 1


@jit_ieee
def _add_signed(sum_d: Floats, value: np.float32, key: np.uint64, row: int) -> None:
    """Add or subtract a number in every place, by the random signs of a row."""
    for word in range(len(sum_d) // 64):
        bits = _drawn(key, row * (len(sum_d) // 64) + word)
        part = sum_d[64 * word : 64 * word + 64]
        for i in range(64):
            part[i] += value if (bits >> np.uint64(i)) & np.uint64(1) else -value


@jit_ieee
def _add(
    indptr: Ids, features: _Ints, values: Floats, label_indptr: Ids, labels: _Ints, place_K: Ids, key: np.uint64, sums_Td: Floats
) -> None:
    sum_d = np.empty(sums_Td.shape[1], np.float32)
    for n in range(len(indptr) - 1):
        wanted, squares = False, 0.0
        for j in range(label_indptr[n], label_indptr[n + 1]):
            wanted |= place_K[labels[j]] >= 0
        for j in range(indptr[n], indptr[n + 1]):
            squares += np.float64(values[j]) ** 2
        if not wanted or squares == 0:
            continue
        sum_d[:] = 0
        for j in range(indptr[n], indptr[n + 1]):
            _add_signed(sum_d, np.float32(values[j] / np.sqrt(squares)), key, int(features[j]))
        for j in range(label_indptr[n], label_indptr[n + 1]):
            place = place_K[labels[j]]
            if place >= 0:
                for i in range(len(sum_d)):
                    sums_Td[place, i] += sum_d[i]


@jit_ieee
def _make_unit(sums_Td: Floats, key: np.uint64) -> None:
    for t in range(len(sums_Td)):
        squares = 0.0
        for i in range(sums_Td.shape[1]):
            squares += np.float64(sums_Td[t, i]) ** 2
        if squares == 0:
            _add_signed(sums_Td[t], np.float32(1), ~key, t)
            squares = float(sums_Td.shape[1])
        sums_Td[t] /= np.float32(np.sqrt(squares))


@jit_ieee
def _along(vector_d: Floats, direction_d: Floats) -> np.float32:
    """Give the product of two vectors, summed up in eight lanes, whose order is fixed."""
    lanes = np.zeros(8, np.float32)
    for start in range(0, len(vector_d), 8):
        for i in range(8):
            lanes[i] += vector_d[start + i] * direction_d[start + i]
    total: np.float32 = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]))
    return total


@jit_ieee
def _bisect(directions_Td: Floats, order_T: Ids, bounds: Ids, key: np.uint64) -> None:
    """Order labels so that those of places [bounds[b], bounds[b + 1]) are alike: 2-means with halves of set sizes, and again.

    Each node starts from the difference of two of its labels, sorts its labels along it, takes the difference of the halves'
    means, and so on. A stack of ranges of buckets instead of recursion.
    """
    stack = np.empty((128, 2), np.int64)
    stack[0] = 0, len(bounds) - 1
    n_drawn, depth = 0, 1
    while depth:
        depth -= 1
        low, high = stack[depth]
        middle = (low + high) // 2
        start, cut, stop = bounds[low], bounds[middle], bounds[high]
        if high - low < 2 or stop - start < 2:
            continue
        stack[depth], stack[depth + 1] = (low, middle), (middle, high)
        depth += 2
        if cut == start or cut == stop:
            continue
        part, n, n_left = order_T[start:stop], stop - start, cut - start
        one = np.int64(_drawn(key, n_drawn) % np.uint64(n))
        other = (one + 1 + np.int64(_drawn(key, n_drawn + 1) % np.uint64(n - 1))) % n
        n_drawn += 2
        direction_d = directions_Td[part[one]] - directions_Td[part[other]]
        along = np.empty(n, np.float32)
        for _ in range(ROUNDS):
            for t in range(n):
                along[t] = _along(directions_Td[part[t]], direction_d)
            part[:] = part[np.argsort(along, kind="mergesort")]
            left_d, right_d = np.zeros_like(direction_d), np.zeros_like(direction_d)
            for t in range(n):
                if t < n_left:
                    left_d += directions_Td[part[t]]
                else:
                    right_d += directions_Td[part[t]]
            direction_d = right_d / np.float32(n - n_left) - left_d / np.float32(n_left)
