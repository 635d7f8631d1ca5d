"""The kinds of tables that were tried beside `mach.hashing.grouping`: similar labels together, or apart, frequent ones alone ...

Axes: N samples, F features, K labels, B buckets, d width of a projection. A table is int64 (K,); the sums of samples are numpy's
and SciPy's here, so other machines may round them otherwise.
"""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
from numba import njit

from mach.train.schedule import seed_of

ROUNDS = 4  # of balanced 2-means in a node
WIDTH = 48


def random_for(kind: str, seed: int, repetition: int) -> np.random.Generator:
    """Give the source of all that is random in one repetition's table."""
    return np.random.default_rng(seed_of(seed, kind, repetition))


def instance_vectors(X_NF: sp.csr_matrix, Y_NK: sp.csr_matrix, random: np.random.Generator, width: int = WIDTH) -> np.ndarray:
    """Give each label the direction of the sum of its samples' unit features, in d random dimensions: float32 (K, d).

    Labels without samples get random directions.
    """
    signs_Fd = random.choice(np.array([-1, 1], np.float32), (X_NF.shape[1], width))
    return unit(Y_NK.T @ (X_NF @ signs_Fd), random)


def companion_vectors(Y_NK: sp.csr_matrix, random: np.random.Generator, width: int = WIDTH) -> np.ndarray:
    """Give each label the direction of its samples' labels, each by one over its frequency's root: float32 (K, d)."""
    counts_K = np.asarray(Y_NK.sum(0)).ravel()
    signs_Kd = random.choice(np.array([-1, 1], np.float32), (Y_NK.shape[1], width)) / np.sqrt(np.maximum(counts_K, 1))[:, None]
    return unit(Y_NK.T @ (Y_NK @ signs_Kd.astype(np.float32)), random)


def unit(sums_Kd: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Scale rows to length 1; those that are nothing become random directions."""
    vectors_Kd = np.asarray(sums_Kd, np.float32)
    nothing = ~(np.abs(vectors_Kd).max(1) > 0)
    vectors_Kd[nothing] = random.standard_normal((int(nothing.sum()), vectors_Kd.shape[1]), np.float32)
    return vectors_Kd / np.linalg.norm(vectors_Kd, axis=1, keepdims=True)


def similar_order(vectors_Kd: np.ndarray, n_leaves: int, random: np.random.Generator) -> np.ndarray:
    """Order labels so that places [i K / n, (i + 1) K / n) hold similar ones, by bisection into halves: int64 (K,)."""
    order_K = random.permutation(len(vectors_Kd))
    bounds = np.arange(n_leaves + 1) * len(vectors_Kd) // n_leaves
    _bisect(np.ascontiguousarray(vectors_Kd), order_K, bounds, random.integers(1 << 62), ROUNDS)
    return order_K


@njit(cache=True, nogil=True)
def _bisect(vectors: np.ndarray, order: np.ndarray, bounds: np.ndarray, state: int, rounds: int) -> None:
    d = vectors.shape[1]
    stack = [(0, len(bounds) - 1)]
    while len(stack):
        low, high = stack.pop()
        if high - low < 2:
            continue
        middle = (low + high) // 2
        start, cut, stop = bounds[low], bounds[middle], bounds[high]
        stack.append((low, middle))
        stack.append((middle, high))
        n = stop - start
        if n < 2 or cut == start or cut == stop:
            continue
        part = order[start:stop].copy()
        state = (state * 6364136223846793005 + 1442695040888963407) & 0x7FFFFFFFFFFFFFFF
        i = (state >> 20) % n
        j = (i + 1 + (state >> 40) % (n - 1)) % n
        direction = vectors[part[i]] - vectors[part[j]]
        along = np.empty(n, np.float32)
        for _ in range(rounds):
            for t in range(n):
                total = np.float32(0)
                for c in range(d):
                    total += vectors[part[t], c] * direction[c]
                along[t] = total
            part = part[np.argsort(along, kind="mergesort")]
            left, right = np.zeros(d, np.float32), np.zeros(d, np.float32)
            for t in range(n):
                if t < cut - start:
                    left += vectors[part[t]]
                else:
                    right += vectors[part[t]]
            direction = right / np.float32(stop - cut) - left / np.float32(cut - start)
        order[start:stop] = part


def together(order_K: np.ndarray, n_buckets: int) -> np.ndarray:
    """Put neighbours of an order into one bucket."""
    K = len(order_K)
    table_K = np.empty(K, np.int64)
    bounds = np.arange(n_buckets + 1) * K // n_buckets
    table_K[order_K] = np.repeat(np.arange(n_buckets), np.diff(bounds))
    return table_K


def apart(order_K: np.ndarray, n_buckets: int, random: np.random.Generator) -> np.ndarray:
    """Deal an order out: B neighbours in a row go to B buckets, in a random order."""
    table_K = np.empty(len(order_K), np.int64)
    for start in range(0, len(order_K), n_buckets):
        run = order_K[start : start + n_buckets]
        table_K[run] = random.permutation(n_buckets)[: len(run)]
    return table_K


def tail_together(vectors_Kd: np.ndarray, is_tail_K: np.ndarray, n_buckets: int, random: np.random.Generator) -> np.ndarray:
    """Put similar labels of the tail together, share the others out over the same buckets at random."""
    table_K = np.empty(len(is_tail_K), np.int64)
    tail, head = np.flatnonzero(is_tail_K), random.permutation(np.flatnonzero(~is_tail_K))
    if len(tail):
        order = similar_order(vectors_Kd[tail], n_buckets, random)
        table_K[tail] = together(order, n_buckets)
    places = np.arange(len(head)) % n_buckets
    table_K[head] = random.permutation(n_buckets)[places]
    return table_K


def strata(vectors_Kd: np.ndarray, is_tail_K: np.ndarray, n_buckets: int, random: np.random.Generator) -> np.ndarray:
    """Put similar labels of the tail together, and the others at random, in buckets of their own.

    The others get a quarter of the buckets, or one each if they are fewer, or their share if that is more.
    """
    table_K = np.empty(len(is_tail_K), np.int64)
    tail, head = np.flatnonzero(is_tail_K), random.permutation(np.flatnonzero(~is_tail_K))
    n_head = max(-(-n_buckets * len(head) // len(is_tail_K)), min(len(head), n_buckets // 4))
    if len(tail):
        n_head = min(n_head, n_buckets - 1)
        table_K[tail] = n_head + together(similar_order(vectors_Kd[tail], n_buckets - n_head, random), n_buckets - n_head)
    table_K[head] = np.arange(len(head)) % max(1, n_head)
    return table_K


def frequent_alone(counts_K: np.ndarray, n_buckets: int, n_alone: int, random: np.random.Generator) -> np.ndarray:
    """Give the most frequent labels a bucket each, share the others out at random."""
    order_K = np.argsort(-counts_K, kind="stable")
    table_K = np.empty(len(counts_K), np.int64)
    table_K[order_K[:n_alone]] = np.arange(n_alone)
    rest = random.permutation(order_K[n_alone:])
    table_K[rest] = n_alone + np.arange(len(rest)) % (n_buckets - n_alone)
    return table_K


def even_loads(counts_K: np.ndarray, n_buckets: int, random: np.random.Generator) -> np.ndarray:
    """Give every bucket about the same number of positives: the most frequent first, each to the least loaded of eight."""
    shuffled = random.permutation(len(counts_K))
    order_K = shuffled[np.argsort(-counts_K[shuffled], kind="stable")]
    table_K = np.empty(len(counts_K), np.int64)
    choices_K8 = random.integers(n_buckets, size=(len(counts_K), 8))
    load_B = np.zeros(n_buckets)
    for label, choices in zip(order_K, choices_K8, strict=True):
        bucket = choices[np.argmin(load_B[choices])]
        table_K[label] = bucket
        load_B[bucket] += counts_K[label] + 0.5
    return table_K


def as_scored(
    affinity_KB: sp.csr_matrix, table_K: np.ndarray, n_buckets: int, n_choices: int, random: np.random.Generator
) -> np.ndarray:
    """Move each label, frequent ones first, to the least loaded of the few buckets that its samples score highest.

    Source: Gupta et al. 2021, arXiv:2103.09944 (IRLI). A label without samples stays. `affinity_KB` is sparse.
    """
    K = len(table_K)
    counts_K = np.diff(affinity_KB.indptr)
    found_K, load_B = table_K.copy(), np.zeros(n_buckets, np.int64)
    seen = np.flatnonzero(counts_K)
    np.add.at(load_B, table_K[counts_K == 0], 1)
    limit = 2 * -(-K // n_buckets)
    for label in random.permutation(seen):
        row = slice(affinity_KB.indptr[label], affinity_KB.indptr[label + 1])
        best = np.argsort(-affinity_KB.data[row], kind="stable")[:n_choices]
        choices = affinity_KB.indices[row][best]
        choices = choices[load_B[choices] < limit]
        bucket = choices[np.argmin(load_B[choices])] if len(choices) else np.argmin(load_B)
        found_K[label] = bucket
        load_B[bucket] += 1
    return found_K
