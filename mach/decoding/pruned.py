"""The kernels of the pruned search: certify the k best labels of a sample without scoring most of the others.

Open the d best buckets of every repetition; t_r is the best score left unopened in repetition r, and U the sum of the t_r. A
label exceeds U by at most e, the sum of s_r - t_r over the opened buckets that hold it. So with k labels known that score theta
or more, every label that can still enter has U + e >= theta. Three steps:

1. peaks: the maximum of each 32 buckets, one pass over the scores. What follows reads little else of them (`peaks`).
2. guess: the labels of greatest e in a few buckets of a few repetitions are scored, which gives theta.
3. sweep: at the depth of least predicted cost for this theta, e is added up in small cells (`cells`). A label whose cell reaches
   theta - U is scored at once, and theta rises with what is found.

For the minimum and the median an opened bucket is one of score theta or more, and e counts them: a label needs all of the
repetitions that were opened, or as many as half of all repetitions leave to them.

Rounding: a float32 sum in a fixed order never falls when a term rises, so a label scores at most the float32 sum of its bounds
u_r, t_r <= u_r <= m_r (the maximum). That differs from their exact sum by less than R 2**-24 sum max(|t_r|, |m_r|), of which
twice is added to U. Minimum and median do not round.

Source: Fagin, Lotem & Naor 2003, J. Comput. Syst. Sci. 66(4), the threshold algorithm; Turtle & Flood 1995, MaxScore.

Axes: N samples, R repetitions, B buckets, M peaks, K labels, k labels kept, D opened buckets of a repetition, best first.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mach.decoding.cells import FULL, SPARE, cells_for, count_labels, list_buckets, open_buckets
from mach.decoding.only import Only
from mach.decoding.peaks import collect, find_best, find_peaks, n_from
from mach.decoding.scan import MIN, SUM
from mach.decoding.topk import Float32, Int64
from mach.decoding.work import BINS, MAX_CELLS, Float64, Scratch, Task
from mach.hashing.inverse import Inverse
from mach.kernels import jit

GUESS_ROWS, MORE_ROWS = 8, 32  # repetitions that the guess opens, and that it opens where these do not tell enough
CLEAR = FULL // 4  # a cell of this, two repetitions' best or more, is worth a score at once
UNIT = 2048  # what a cell must reach at first; theta may rise 32 times as far above U until the cells' 16 bits are full
SAMPLE = 64  # buckets that tell the mean of a repetition
FEW = 5  # up to so many labels, GUESS_ROWS tell enough for a minimum or a median
CLEAR_GAIN = 0.85  # of a scan's time: after a search predicted to take more, the next samples are not searched
SEARCH_SHARE = 0.1  # of the scan's time, at most, goes into looking for a depth


class Costs(NamedTuple):
    """What each part of a search takes on one core, in ns."""

    read: float  # a bucket score, in the pass for the peaks
    open: float  # an opened bucket: to find it, sort it and begin its labels
    touch: float  # a label of an opened bucket
    score: float  # a repetition of a label that is scored
    scan: float  # a repetition of a label in the scan, for eight samples at once
    median: float  # the same for the median
    lay: float  # a bucket score laid beside those of other samples, for both
    coarse: float  # as `scan`, for a sum of bytes and 32 samples at once
    pack: float  # a bucket score made a byte and laid beside others
    invert: float  # a repetition of a label, sorted by bucket for a family that is not arithmetic


@jit
def prune(
    scores_NRB: Float32, inverse: Inverse, aggregate: int, depth: int, costs: Costs, try_ns: float, budget_ns: float, only: Only,
    work: Scratch, first: int, stop: int, top_Nk: Float32, labels_Nk: Int64, numbers_N3: Int64,
) -> None:  # fmt: skip
    """Search the samples [first, stop); note of each the depth, or -1 where a scan is predicted to be quicker, and the counts.

    Samples of a batch are alike: after one given up, or nearly as slow as a scan, 3, then 15, then 63 are not searched.

    Args: try_ns, what a search costs until its depth is planned; budget_ns, what a scan costs a sample.
    """
    n_failed = n_skipped = 0
    for n in range(first, stop):
        if n_failed and n_skipped < (1 << min(2 * n_failed, 6)) - 1:
            n_skipped += 1
            numbers_N3[n, 0] = -1
            continue
        n_skipped = 0
        work.counts[:] = 0
        without = only.without[only.starts[n] : only.starts[n + 1]]
        task = Task(scores_NRB[n], inverse, aggregate, without, only.allowed, top_Nk[n], labels_Nk[n])
        numbers_N3[n, 0] = _search(task, work, depth, costs, budget_ns)
        numbers_N3[n, 1:] = work.counts[:2]
        n_failed = n_failed + 1 if numbers_N3[n, 0] < 0 or try_ns + work.counts[2] > CLEAR_GAIN * budget_ns else 0
        for i in range(min(work.counts[0], len(work.used))):
            work.seen[work.used[i]] = 0


@jit
def _search(task: Task, work: Scratch, depth: int, costs: Costs, budget_ns: float) -> int:
    """Give the depth at which the k best are certain, or -1 if the sample is better scanned."""
    R, B = task.scores_RB.shape
    find_peaks(task.scores_RB, work.peaks_RM)
    find_best(task.scores_RB, min(depth, B), work)
    n_guess, n_a_bucket = min(depth, 12 + 3 * len(task.top_k) // 4), _len_of_bucket(task.inverse)
    _guess(task, work, n_guess, GUESS_ROWS)
    more_ns = costs.touch * (MORE_ROWS + 2 * GUESS_ROWS) * n_guess * n_a_bucket
    if not math.isfinite(task.top_k[0]):
        return -1
    if task.aggregate != SUM:
        if len(task.top_k) > FEW:
            _guess(task, work, n_guess, MORE_ROWS)
        return _sweep_counts(task, work, costs, budget_ns)
    chosen, least_ns = _plan(task, work, depth, costs)
    if R > GUESS_ROWS and (chosen == 0 or least_ns > 2 * more_ns):
        _guess(task, work, n_guess, MORE_ROWS)
    while True:
        deepest = 0
        for r in range(R):
            deepest = max(deepest, work.n_R[r])
        chosen, least_ns = _plan(task, work, deepest, costs)
        if (chosen < deepest and chosen > 0) or depth >= B:
            break
        more_ns = 2 * R * depth * costs.open  # to find twice as many
        if more_ns > SEARCH_SHARE * budget_ns or more_ns + costs.touch * R * depth * n_a_bucket > min(budget_ns, least_ns):
            break
        depth = min(2 * depth, B)
        find_best(task.scores_RB, depth, work)
    if chosen == 0 or least_ns > budget_ns:
        return -1
    work.counts[2] = int(least_ns)
    return chosen if _sweep(task, work, chosen) else -1


@jit
def _guess(task: Task, work: Scratch, depth: int, most_rows: int) -> None:
    """Score the most promising labels of GUESS_ROWS repetitions, at least k of them where there are as many.

    Promising by their score in at most `most_rows` repetitions, if the buckets that are not opened gave a mean score.
    """
    R, is_first = len(task.scores_RB), not math.isfinite(task.top_k[0])
    n_rows, widest = min(R, most_rows), 0.0
    for i in range(n_rows):
        r = i * R // n_rows
        work.floor_R[r] = min(_mean(task.scores_RB[r, :SAMPLE]), float(work.best_R[r]))
        widest = max(widest, float(work.best_R[r]) - work.floor_R[r])
    if not widest > 0 or not widest < np.inf:
        return
    scale = FULL / (n_rows + 1) / widest
    cells = cells_for(work, n_rows * depth * _len_of_bucket(task.inverse))
    n_open = n_asked = 0
    for i in range(n_rows):
        n_open = list_buckets(work, i * R // n_rows, depth, scale, n_open)
        n_asked = n_open if i < GUESS_ROWS else n_asked
    for i in range(n_open):
        work.amounts[i] &= -2  # even, for the count
    open_buckets(task, work, cells, n_open, CLEAR if is_first else FULL + 1, 0.0, 0.0)
    if is_first and math.isfinite(task.top_k[0]):
        return
    count_labels(task, work, cells, n_asked)
    wanted, n, at = 2 * (len(task.top_k) + 4 + len(task.without)), 0, BINS
    while at > 0 and n < wanted:
        at -= 1
        n += work.bins[at]
    work.amounts[:n_asked] = 0
    open_buckets(task, work, cells, n_asked, max(1, at * (FULL + 1) // BINS), 0.0, 0.0)


@jit
def _mean(values: Float32) -> float:
    total = 0.0
    for i in range(len(values)):
        total += float(values[i])
    return total / len(values)


@jit
def _plan(task: Task, work: Scratch, deepest: int, costs: Costs) -> tuple[int, float]:
    """Give the depth up to `deepest` that certifies theta at the least predicted cost, ns; 0 if none does.

    How many labels will be scored: all of a bucket that suffices alone, and of the others as if buckets were drawn at random and
    each were worth the excess at a quarter of the depth.
    """
    R, B = task.scores_RB.shape
    theta, K = float(task.top_k[0]), float(task.inverse.n_labels)
    n_R, best_R, floor_R, excess_R = work.n_R, work.best_R, work.floor_R, work.excess_R
    chosen, least_ns, depth = 0, np.inf, 1
    while depth <= deepest:
        _set_floors(work.scores_RB, n_R, work.below_R, depth, floor_R)
        base = _base(floor_R, best_R)
        if base < theta:
            n_open = n_alone = 0.0
            for r in range(R):
                n_open += min(depth, n_R[r])
                for d in range(min(depth, n_R[r])):
                    if float(work.scores_RB[r, d]) - floor_R[r] < theta - base:
                        break
                    n_alone += 1
                typical = work.scores_RB[r, depth // 4] if depth // 4 < n_R[r] else work.below_R[r]
                excess, at = float(typical) - floor_R[r], r
                while at > 0 and excess_R[at - 1] < excess:
                    excess_R[at] = excess_R[at - 1]
                    at -= 1
                excess_R[at] = excess
            n_touched = n_open * K / B
            share = min(SPARE, MAX_CELLS / max(1.0, n_touched))
            hits, left, chance, together = 0, theta - base, K, n_touched * share
            while (left > 0 or hits < 2) and hits < R:
                left -= excess_R[hits]
                chance *= (R - hits) / (hits + 1.0) * (n_open / R / B)
                together *= 1 / share / (hits + 1.0)
                hits += 1
            n_scored = n_alone * K / B + (0.0 if left > 0 else chance + together)
            ns = costs.open * n_open + costs.touch * n_touched + costs.score * R * n_scored
            if ns < least_ns:
                chosen, least_ns = depth, ns
        depth += max(1, depth // 4)
    return chosen, least_ns


@jit
def _sweep(task: Task, work: Scratch, depth: int) -> bool:
    """Score every label whose bound reaches theta; false if there are more than memory was set aside for."""
    R = len(task.scores_RB)
    _set_floors(work.scores_RB, work.n_R, work.below_R, depth, work.floor_R)
    base = _base(work.floor_R, work.best_R)
    scale = UNIT / (float(task.top_k[0]) - base)
    cells = cells_for(work, R * depth * _len_of_bucket(task.inverse))
    n_open = 0
    for r in range(R):
        n_open = list_buckets(work, r, depth, scale, n_open)
    open_buckets(task, work, cells, n_open, UNIT, base, scale)
    return bool(work.counts[0] <= len(work.used))


@jit
def _sweep_counts(task: Task, work: Scratch, costs: Costs, budget_ns: float) -> int:
    """Do the same for minimum and median: open, in the repetitions that have few of them, the buckets of theta or more.

    A label of theta or more is in such a bucket in all repetitions, or, for the median, in half of them. Of i repetitions
    opened it is in all i, or in i - R/2.
    """
    R, B = task.scores_RB.shape
    theta, K = task.top_k[0], float(task.inverse.n_labels)
    for r in range(R):
        n, at = n_from(work.peaks_RM[r], theta), r  # as many buckets, unless most peaks are that high
        if 2 * n > len(work.peaks_RM[r]):
            n = n_from(task.scores_RB[r], theta)
        work.n_R[r] = n
        while at > 0 and work.n_R[work.order_R[at - 1]] > n:
            work.order_R[at] = work.order_R[at - 1]
            at -= 1
        work.order_R[at] = r
    spared = 0 if task.aggregate == MIN else R // 2
    chosen, least_ns, n_open = 0, np.inf, 0.0
    for i in range(1, R + 1):
        n_open += work.n_R[work.order_R[i - 1]]
        hits = i - spared
        if hits < 1:
            continue
        n_scored = K
        for j in range(hits):
            n_scored *= (i - j) / (j + 1.0) * (n_open / i / B)
        ns = costs.open * n_open + costs.touch * n_open * K / B + costs.score * R * min(n_scored, K)
        if ns < least_ns:
            chosen, least_ns = i, ns
    if least_ns > budget_ns:
        return -1
    work.counts[2] = int(least_ns)
    n_touched = 0.0
    for i in range(chosen):
        n_touched += work.n_R[work.order_R[i]] * K / B
    listed = deepest = 0
    for i in range(chosen):
        r = work.order_R[i]
        n = collect(task.scores_RB[r], work.peaks_RM[r], theta, work.keys_B)
        deepest = max(deepest, n)
        for d in range(n):
            work.rows[listed], work.buckets[listed], work.amounts[listed] = r, work.keys_B[d] & 0x7FFFFFFF, 1
            listed += 1
    open_buckets(task, work, cells_for(work, n_touched), listed, chosen - spared, 0.0, 0.0)
    return deepest if work.counts[0] <= len(work.used) else -1


@jit
def _set_floors(scores_RB: Float32, n_R: Int64, below_R: Float32, depth: int, floor_R: Float64) -> None:
    """Write t_r, the bound on what a depth leaves unopened."""
    for r in range(len(n_R)):
        floor_R[r] = scores_RB[r, depth] if depth < n_R[r] else below_R[r]


@jit
def _base(floor_R: Float64, best_R: Float32) -> float:
    """Give U and what rounding may add: at least the score of any label that no opened bucket holds."""
    total, size = 0.0, 0.0
    for r in range(len(floor_R)):
        total += floor_R[r]
        size += max(abs(floor_R[r]), abs(float(best_R[r])))
    return total + 2 * len(floor_R) * 2.0**-24 * size


@jit
def _len_of_bucket(inverse: Inverse) -> float:
    """Give the mean number of labels in a bucket."""
    return float(inverse.n_labels) / float(inverse.n_buckets)
