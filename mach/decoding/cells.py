"""Bounds on labels, added up in small cells, bucket by bucket; the labels whose cell reaches a level are scored at once.

Labels may share a cell: that can only raise a bound. Cells hold integers, rounded up.

Numba's cache does not see a change in another file: after editing this one, delete `__pycache__`.

Axes: R repetitions, B buckets, K labels, k labels kept, D opened buckets of a repetition, best first.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mach.decoding.scan import aggregate_one
from mach.decoding.topk import Int64, is_excluded, is_worse, replace_worst
from mach.decoding.work import MAX_CELLS, SOME_HITS, Cells, Int32, Scratch, Task
from mach.hashing.inverse import Words, first_of_progression, small_buckets
from mach.kernels import jit

FULL = 65535
SPARE = 4  # cells for each label touched
MIN_CELLS = 1 << 12


@jit
def cells_for(work: Scratch, n_touched: float) -> Cells:
    """Give empty cells, a power of two: about so many as so many touched labels need."""
    n = MIN_CELLS
    while n < SPARE * n_touched and n < MAX_CELLS:
        n *= 2
    cells = work.cells[:n]
    cells[:] = 0
    return cells


@jit
def list_buckets(work: Scratch, r: int, depth: int, scale: float, n_open: int) -> int:
    """Append the best buckets of a repetition to those to be opened, with their scaled excess; give the length of the list."""
    scores_D, buckets_D, floor = work.scores_RB[r], work.buckets_RB[r], work.floor_R[r]
    rows, buckets, amounts = work.rows, work.buckets, work.amounts
    for d in range(min(depth, work.n_R[r])):
        rows[n_open], buckets[n_open] = r, buckets_D[d]
        amounts[n_open] = np.int64(min(float(FULL), math.ceil((float(scores_D[d]) - floor) * scale)))
        n_open += 1
    return n_open


@jit
def count_labels(task: Task, work: Scratch, cells: Cells, n_open: int) -> None:
    """Count the labels of the listed buckets by what their cells hold, those that are not allowed left out.

    Once each: what is counted becomes odd.
    """
    inverse, bins, allowed, rows, buckets = task.inverse, work.bins, task.allowed, work.rows, work.buckets
    p, b_R, back_R, step_R, n_buckets = inverse.p, inverse.b_R, inverse.back_R, inverse.step_R, np.uint64(inverse.n_buckets)
    starts_RB, ids_RK, mask, n_allowed = inverse.starts_RB, inverse.ids_RK, np.uint64(len(cells) - 1), np.uint64(len(allowed))
    bins[:] = 0
    for i in range(n_open):
        r, bucket = rows[i], buckets[i]
        if inverse.is_arithmetic:
            step = step_R[r]
            label, n = first_of_progression(np.uint64(bucket), p, b_R[r], back_R[r], n_buckets)
            for _ in range(n):
                if n_allowed == 0 or (label < n_allowed and allowed[label]):
                    bins[cells[label & mask] >> 8] += 1 - (cells[label & mask] & 1)
                    cells[label & mask] |= 1
                label = _after(label, step, p)
        else:
            for at in range(starts_RB[r, bucket], starts_RB[r, bucket + 1]):
                label = np.uint64(ids_RK[r, at])
                if n_allowed == 0 or allowed[label]:
                    bins[cells[label & mask] >> 8] += 1 - (cells[label & mask] & 1)
                    cells[label & mask] |= 1


@jit
def open_buckets(task: Task, work: Scratch, cells: Cells, n_open: int, least: int, base: float, scale: float) -> None:
    """Add the amounts of the listed buckets to the cells of their labels; score the labels whose cell reaches `least`.

    With a scale `least` is theta - base, and rises with theta.
    """
    inverse, done = task.inverse, 0
    while done < n_open and work.counts[0] <= len(work.used):
        if scale > 0:
            least = int(min(float(FULL), math.floor((float(task.top_k[0]) - base) * scale)))
        if inverse.is_arithmetic:
            done, n_hits, n_touched = _add_progressions(
                cells, work.rows, work.buckets, work.amounts, done, n_open, least, work.hits,
                inverse.p, inverse.b_R, inverse.back_R, inverse.step_R, np.uint64(inverse.n_buckets),
            )  # fmt: skip
        else:
            done, n_hits, n_touched = _add_lists(
                cells, work.rows, work.buckets, work.amounts, done, n_open, least, work.hits, inverse.starts_RB, inverse.ids_RK
            )
        work.counts[1] += n_touched
        _offer(task, work, n_hits)


@jit
def _add_progressions(
    cells: Cells, rows: Int32, buckets: Int32, amounts: Int64, done: int, n_open: int, least: int, hits: Int64,
    p: np.uint64, b_R: Words, back_R: Words, step_R: Words, n_buckets: np.uint64,
) -> tuple[int, int, int]:  # fmt: skip
    """Add, from the bucket `done` on, until there are some hits; give how far it came, the hits and the labels touched.

    Arguments are plain: each array of a tuple costs an atomic count, and buckets are short.
    """
    mask, n_hits, n_touched = np.uint64(len(cells) - 1), 0, 0
    while done < n_open and n_hits < SOME_HITS:
        r, amount = rows[done], amounts[done]
        step = step_R[r]
        label, n = first_of_progression(np.uint64(buckets[done]), p, b_R[r], back_R[r], n_buckets)
        for _ in range(n):
            value = min(np.int64(cells[label & mask]) + amount, FULL)
            cells[label & mask] = value
            if value >= least:
                hits[n_hits] = label
                n_hits += 1
            label = _after(label, step, p)
        n_touched += n
        done += 1
    return done, n_hits, n_touched


@jit
def _add_lists(
    cells: Cells, rows: Int32, buckets: Int32, amounts: Int64, done: int, n_open: int, least: int, hits: Int64,
    starts_RB: Int64, ids_RK: npt.NDArray[np.unsignedinteger[Any]],
) -> tuple[int, int, int]:  # fmt: skip
    mask, n_hits, n_touched = np.uint64(len(cells) - 1), 0, 0
    while done < n_open and n_hits < SOME_HITS:
        r, bucket, amount = rows[done], buckets[done], amounts[done]
        for i in range(starts_RB[r, bucket], starts_RB[r, bucket + 1]):
            label = np.uint64(ids_RK[r, i])
            value = min(np.int64(cells[label & mask]) + amount, FULL)
            cells[label & mask] = value
            if value >= least:
                hits[n_hits] = label
                n_hits += 1
            n_touched += 1
        done += 1
    return done, n_hits, n_touched


@jit
def _after(label: np.uint64, step: np.uint64, p: np.uint64) -> np.uint64:
    label += step
    return label - p if label >= p else label


@jit
def _offer(task: Task, work: Scratch, n_hits: int) -> None:
    """Score the labels of work.hits that were not yet, and put into the heap those better than the worst there."""
    scores_RB, inverse, allowed, top_k, labels_k = task.scores_RB, task.inverse, task.allowed, task.top_k, task.labels_k
    seen, used, counts, values_R = work.seen, work.used, work.counts, work.values_R
    a_R, b_R, p, n_buckets = inverse.a_R, inverse.b_R, inverse.p, np.uint64(inverse.n_buckets)
    small_a_R, small_b_R, buckets_R = inverse.small_a_R, inverse.small_b_R, work.buckets_R
    mask = len(seen) - 1
    for i in range(n_hits):
        label = work.hits[i]
        if label >= inverse.n_labels or (len(allowed) and not allowed[label]):
            continue
        n = counts[0]
        if n >= len(used):
            counts[0] = len(used) + 1  # no memory for more: given up
            return
        at = ((label * 0x9E3779B1) >> 7) & mask
        while seen[at] != 0 and seen[at] != label + 1:
            at = (at + 1) & mask
        if seen[at] != 0:
            continue
        seen[at], used[n] = label + 1, at
        counts[0] = n + 1
        if is_excluded(task.without, label):
            continue
        if inverse.is_small:
            small_buckets(small_a_R, small_b_R, float(p), float(n_buckets), label, buckets_R)
        elif inverse.is_arithmetic:
            for r in range(len(buckets_R)):
                buckets_R[r] = (a_R[r] * np.uint64(label) + b_R[r]) % p % n_buckets
        else:
            for r in range(len(buckets_R)):
                buckets_R[r] = inverse.table_RK[r, label]
        for r in range(len(buckets_R)):
            values_R[r] = scores_RB[r, buckets_R[r]]
        score: Any = aggregate_one(values_R, task.aggregate)
        if is_worse(top_k[0], labels_k[0], score, label):
            replace_worst(top_k, labels_k, score, label)
