"""The kernels of the pruned search: certify the k best labels of a sample without scoring most of the others.

Open the d best buckets of every repetition; t_r is the best score left unopened in repetition r, and U the sum of the t_r. A
label exceeds U by at most e, the sum of s_r - t_r over the opened buckets that hold it. So with k labels known that score theta
or more, every label that can still enter has U + e >= theta. Three steps:

1. peaks: the maximum of each 32 buckets, one pass over the scores. What follows reads little else of them.
2. guess: the labels of greatest e in a few buckets of a few repetitions are scored, which gives theta.
3. sweep: at the depth of least predicted cost for this theta, e is added up in small cells. Labels may share a cell: that can
   only raise a bound. A label whose cell reaches theta - U is scored at once, and theta rises with what is found.

For the minimum and the median an opened bucket is one of score theta or more, and e counts them: a label needs all of the
repetitions that were opened, or as many as half of all repetitions leave to them.

Rounding: a float32 sum in a fixed order never falls when a term rises, so a label scores at most the float32 sum of its bounds
u_r, t_r <= u_r <= m_r (the maximum). That differs from their exact sum by less than R 2**-24 sum max(|t_r|, |m_r|), of which
twice is added to U. Cells hold integers, rounded up; minimum and median do not round.

Source: Fagin, Lotem & Naor 2003, J. Comput. Syst. Sci. 66(4), the threshold algorithm; Turtle & Flood 1995, MaxScore.

Axes: N samples, R repetitions, B buckets, M peaks, K labels, k labels kept, D opened buckets of a repetition, best first.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mach.decoding.scan import MIN, SUM, aggregate_one
from mach.decoding.topk import Float32, Int64, is_excluded, is_worse, replace_worst
from mach.hashing.inverse import Inverse, bucket_of, first_label
from mach.kernels import jit

PEAK = 32  # buckets of a peak: two vectors of 64 bytes
GUESS_ROWS = 8  # repetitions that the guess opens
UNIT = 2048  # what a cell must reach at first; theta may rise 32 times as far above U until the cells' 16 bits are full
FULL = 65535
SPARE = 8  # cells for each label touched
MIN_CELLS, MAX_CELLS = 1 << 12, 1 << 22
BINS = 256

Float64 = npt.NDArray[np.float64]


class Costs(NamedTuple):
    """What each part of a search takes on one core, in ns."""

    read: float  # a bucket score, in the pass for the peaks
    open: float  # an opened bucket: to find it, sort it and begin its labels
    touch: float  # a label of an opened bucket
    score: float  # a repetition of a label that is scored
    scan: float  # a repetition of a label in the scan, for eight samples


class Only(NamedTuple):
    """Which labels may be found."""

    starts: Int64  # (N + 1,): the labels without[starts[n] : starts[n + 1]], sorted, are not for sample n
    without: Int64
    allowed: npt.NDArray[np.uint8]  # (K,), or (0,): all


class Scratch(NamedTuple):
    """Memory of one thread, used again for each sample."""

    peaks_RM: Float32
    keys_B: npt.NDArray[np.int64]
    scores_RB: Float32  # the best scores of each repetition, best first; as many as were asked for
    buckets_RB: npt.NDArray[np.int32]
    n_R: Int64  # how many
    best_R: Float32
    below_R: Float32  # at least every score that is not among them
    excess_R: Float64
    order_R: Int64
    cells: npt.NDArray[np.uint16]
    seen: Int64  # labels scored for this sample, plus 1, by open addressing; 0: empty
    used: Int64  # the places in `seen` that are taken
    counts: Int64  # of labels scored and touched
    values_R1: Float32


def scratch(n_repetitions: int, n_buckets: int, n_seen: int) -> Scratch:
    """Give a thread's memory: 10 MiB for the cells and 12 R B bytes, of which a search touches little."""
    R, B = n_repetitions, n_buckets
    return Scratch(
        peaks_RM=np.empty((R, -(-B // PEAK)), np.float32),
        keys_B=np.empty(B, np.int64),
        scores_RB=np.empty((R, B), np.float32),
        buckets_RB=np.empty((R, B), np.int32),
        n_R=np.zeros(R, np.int64),
        best_R=np.empty(R, np.float32),
        below_R=np.empty(R, np.float32),
        excess_R=np.empty(R),
        order_R=np.empty(R, np.int64),
        cells=np.zeros(MAX_CELLS, np.uint16),
        seen=np.zeros(2 * n_seen, np.int64),
        used=np.empty(n_seen, np.int64),
        counts=np.zeros(2, np.int64),
        values_R1=np.empty((R, 1), np.float32),
    )


def _codegen_peak(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    row, at = args
    vector = ir.VectorType(ir.FloatType(), PEAK)
    data = context.make_array(signature.args[0])(context, builder, row).data
    best = builder.load(builder.bitcast(builder.gep(data, [at]), vector.as_pointer()), align=4)
    width = PEAK
    while width > 1:  # the greater of both halves, until one is left
        width //= 2
        halves = [
            builder.shuffle_vector(
                best, ir.Constant(best.type, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), width), list(lanes))
            )
            for lanes in (range(width), range(width, 2 * width))
        ]
        best = builder.select(builder.fcmp_ordered(">", *halves), *halves)
    return builder.extract_element(best, ir.Constant(ir.IntType(32), 0))


@intrinsic
def _peak(typing_context: Any, row_B: Any, at: Any) -> Any:
    """Give the maximum of row[at : at + 32]."""
    return types.float32(row_B, types.intp), _codegen_peak


@jit
def prune(
    scores_NRB: Float32, inverse: Inverse, aggregate: int, depth: int, costs: Costs, budget_ns: float, only: Only,
    work: Scratch, first: int, stop: int, top_Nk: Float32, labels_Nk: Int64, numbers_N3: Int64,
) -> None:  # fmt: skip
    """Search the samples [first, stop); note of each the depth, or -1 where a scan is predicted to be quicker, and the counts.

    Samples of a batch are alike: after one that was given up, 1, then 3, 7, ... are left to the scan untried.
    """
    n_failed = n_skipped = 0
    for n in range(first, stop):
        if n_failed and n_skipped < (1 << min(n_failed, 6)) - 1:
            n_skipped += 1
            numbers_N3[n, 0] = -1
            continue
        n_skipped = 0
        work.counts[:] = 0
        without = only.without[only.starts[n] : only.starts[n + 1]]
        task = Task(scores_NRB[n], inverse, aggregate, without, only.allowed, top_Nk[n], labels_Nk[n])
        numbers_N3[n, 0] = _search(task, work, depth, costs, budget_ns)
        numbers_N3[n, 1:] = work.counts
        n_failed = n_failed + 1 if numbers_N3[n, 0] < 0 else 0
        for i in range(min(work.counts[0], len(work.used))):
            work.seen[work.used[i]] = 0


class Task(NamedTuple):
    """One sample's search."""

    scores_RB: Float32
    inverse: Inverse
    aggregate: int
    without: Int64
    allowed: npt.NDArray[np.uint8]
    top_k: Float32  # a heap, the worst first
    labels_k: Int64


@jit
def _search(task: Task, work: Scratch, depth: int, costs: Costs, budget_ns: float) -> int:
    """Give the depth at which the k best are certain, or -1 if the sample is better scanned."""
    R, B = task.scores_RB.shape
    for r in range(R):
        _find_peaks(task.scores_RB[r], work.peaks_RM[r])
        _find_best(task.scores_RB[r], work.peaks_RM[r], min(depth, B), r, work)
    _guess(task, work, depth)
    theta = float(task.top_k[0])
    if not math.isfinite(theta):
        return -1
    if task.aggregate != SUM:
        return _sweep_counts(task, work, costs, budget_ns)
    n_a_bucket = len_of_bucket(task.inverse)
    while True:
        deepest = 0
        for r in range(R):
            deepest = max(deepest, work.n_R[r])
        chosen, least_ns = _plan(task, work, deepest, costs)
        if (chosen < deepest and chosen > 0) or depth >= B:
            break
        if (costs.open + costs.touch * n_a_bucket) * R * depth > min(budget_ns, least_ns):
            break
        depth = min(4 * depth, B)
        for r in range(R):
            _find_best(task.scores_RB[r], work.peaks_RM[r], depth, r, work)
    if chosen == 0 or least_ns > budget_ns:
        return -1
    return chosen if _sweep(task, work, chosen) else -1


@jit
def len_of_bucket(inverse: Inverse) -> float:
    """Give the mean number of labels in a bucket."""
    return float(inverse.n_labels) / float(inverse.n_buckets)


@jit
def _find_peaks(row_B: Float32, peaks_M: Float32) -> None:
    whole = len(row_B) // PEAK
    for m in range(whole):
        peaks_M[m] = _peak(row_B, m * PEAK)
    if whole < len(peaks_M):
        best = row_B[whole * PEAK]
        for b in range(whole * PEAK, len(row_B)):
            best = max(best, row_B[b])
        peaks_M[whole] = best


@jit
def _ordered(x: np.float32) -> int:
    """Give an integer that rises with a float32, for all but nan."""
    bits = np.int64(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1


@jit
def _float(ordered: int) -> np.float32:
    """Give back the float32 of an `_ordered` integer."""
    bits = ordered if ordered >= 0 else (-(ordered + 1)) | 0x80000000
    return np.uint32(bits).view(np.float32)


@jit
def _n_from(values: Float32, level: np.float32) -> int:
    n = np.int32(0)  # counted without branches: the loop is vectorised
    for i in range(len(values)):
        n += np.int32(values[i] >= level)
    return n


@jit
def _find_best(row_B: Float32, peaks_M: Float32, wanted: int, r: int, work: Scratch) -> None:
    """Find about `wanted` best buckets of a repetition, or fewer among many equal scores, and a bound on all the others."""
    B = len(row_B)
    by_peaks = wanted <= len(peaks_M) // 2  # as many peaks as wanted are as many buckets, or a few more
    low, best = peaks_M[0], peaks_M[0]
    for m in range(len(peaks_M)):
        best = max(best, peaks_M[m])
        low = min(low, peaks_M[m])
    work.best_R[r] = best
    if not by_peaks:
        for b in range(B):
            low = min(low, row_B[b])
    start, end = _ordered(low), _ordered(best) + 1  # count(start) >= wanted > count(end), halved until close
    while end - start > 1:
        middle = start + (end - start) // 2
        n = _n_from(peaks_M, _float(middle)) if by_peaks else _n_from(row_B, _float(middle))
        if n < wanted:
            end = middle
        else:
            start = middle
            if n <= wanted + wanted // 2:
                break
    if end - start == 1 and _n_from(row_B, _float(start)) > 2 * wanted + PEAK:
        start = end  # ties: none of them, as they cannot be told apart
    level = _float(start)
    n = _collect(row_B, peaks_M, level, work.keys_B)
    keys = work.keys_B[:n]
    _sort(keys)
    for i in range(n):
        work.scores_RB[r, i] = _float(-(keys[i] >> 32))
        work.buckets_RB[r, i] = keys[i] & 0x7FFFFFFF
    if n == B:
        n -= 1
        work.below_R[r] = work.scores_RB[r, n]
    else:
        work.below_R[r] = _float(start - 1)
    work.n_R[r] = n


@jit
def _sort(keys: Int64) -> None:
    """Sort a few by insertion, many by the library."""
    if len(keys) > 64:
        keys.sort()
        return
    for i in range(1, len(keys)):
        key, at = keys[i], i
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key


@jit
def _collect(row_B: Float32, peaks_M: Float32, level: np.float32, keys: Int64) -> int:
    """Gather the buckets of a level or more as keys, score falling, then bucket; give their number."""
    n = 0
    for m in range(len(peaks_M)):
        if peaks_M[m] >= level:
            for b in range(m * PEAK, min((m + 1) * PEAK, len(row_B))):
                if row_B[b] >= level:
                    keys[n] = (-_ordered(row_B[b]) << 32) | b
                    n += 1
    return n


@jit
def _floor(work: Scratch, r: int, depth: int) -> float:
    """Give t_r, the bound on what depth leaves unopened."""
    return float(work.scores_RB[r, depth]) if depth < work.n_R[r] else float(work.below_R[r])


@jit
def _clear_cells(cells: npt.NDArray[np.uint16], n_touched: float) -> int:
    """Empty as many cells as suit so many labels; give their number, a power of two."""
    n = MIN_CELLS
    while n < SPARE * n_touched and n < MAX_CELLS:
        n *= 2
    cells[:n] = 0
    return n


@jit
def _guess(task: Task, work: Scratch, depth: int) -> None:
    """Score the most promising labels of a few repetitions, at least k of them where there are as many."""
    R = len(task.scores_RB)
    n_rows = min(R, GUESS_ROWS)
    widest = 0.0
    for i in range(n_rows):
        r = i * R // n_rows
        widest = max(widest, float(work.best_R[r]) - _floor(work, r, depth))
    if widest <= 0:
        return
    scale = FULL / (n_rows + 1) / widest
    n_cells = _clear_cells(work.cells, n_rows * depth * len_of_bucket(task.inverse))
    cells = work.cells[:n_cells]
    bins = np.zeros(BINS, np.int64)
    wanted, least = 2 * n_rows * (len(task.top_k) + 2 + len(task.without)), FULL + 1
    for step in range(3):  # add up; count how many labels have how much; score the best
        for i in range(n_rows):
            r = i * R // n_rows
            floor = _floor(work, r, depth)
            for d in range(min(depth, work.n_R[r])):
                bucket = work.buckets_RB[r, d]
                if step == 0:
                    amount = math.ceil((float(work.scores_RB[r, d]) - floor) * scale)
                    work.counts[1] += _touch(task, work, cells, r, bucket, amount, FULL + 1, 0.0, 0.0)
                elif step == 1:
                    _count(task, cells, r, bucket, bins)
                else:
                    work.counts[1] += _touch(task, work, cells, r, bucket, 0, least, 0.0, 0.0)
        if step == 1:
            n, at = 0, BINS
            while at > 0 and n < wanted:
                at -= 1
                n += bins[at]
            least = max(1, at * (FULL + 1) // BINS)


@jit
def _count(task: Task, cells: npt.NDArray[np.uint16], r: int, bucket: int, bins: Int64) -> None:
    inverse = task.inverse
    mask, p, step = np.uint64(len(cells) - 1), inverse.p, inverse.step_R[r]
    label, n = first_label(inverse, r, bucket)
    for i in range(n):
        key = label if inverse.is_arithmetic else np.uint64(inverse.ids_RK[r, label + np.uint64(i)])
        if len(task.allowed) == 0 or (key < np.uint64(len(task.allowed)) and task.allowed[key]):
            bins[cells[key & mask] >> 8] += 1
        if inverse.is_arithmetic:
            label += step
            if label >= p:
                label -= p


@jit
def _touch(
    task: Task, work: Scratch, cells: npt.NDArray[np.uint16], r: int, bucket: int, amount: int, least: int, base: float, scale: float
) -> int:
    """Add an amount to the cell of each label of a bucket and offer those whose cell reaches `least`; give their number.

    With a scale, `least` rises with theta.
    """
    inverse = task.inverse
    mask, p, step = np.uint64(len(cells) - 1), inverse.p, inverse.step_R[r]
    label, n = first_label(inverse, r, bucket)
    is_arithmetic, ids_K = inverse.is_arithmetic, inverse.ids_RK[r if len(inverse.ids_RK) else 0 :]
    for i in range(n):
        key = label if is_arithmetic else np.uint64(ids_K[0, label + np.uint64(i)])
        at = key & mask
        value = min(np.int64(cells[at]) + amount, FULL)
        cells[at] = value
        if value >= least:
            _offer(task, work, np.int64(key))
            if scale > 0:
                least = _least(float(task.top_k[0]), base, scale)
        if is_arithmetic:
            label += step
            if label >= p:
                label -= p
    return n


@jit
def _least(theta: float, base: float, scale: float) -> int:
    return np.int64(min(float(FULL), math.floor((theta - base) * scale)))


@jit
def _offer(task: Task, work: Scratch, label: int) -> None:
    """Score a label, unless it was, and put it into the heap if it is better than the worst there."""
    if label >= task.inverse.n_labels or (len(task.allowed) and not task.allowed[label]):
        return
    n = work.counts[0]
    if n >= len(work.used):
        work.counts[0] = len(work.used) + 1  # no memory for more: given up
        return
    mask = len(work.seen) - 1
    at = ((label * 0x9E3779B1) >> 7) & mask
    while work.seen[at] != 0:
        if work.seen[at] == label + 1:
            return
        at = (at + 1) & mask
    work.seen[at], work.used[n] = label + 1, at
    work.counts[0] += 1
    if is_excluded(task.without, label):
        return
    for r in range(len(work.values_R1)):
        work.values_R1[r, 0] = task.scores_RB[r, bucket_of(task.inverse, r, label)]
    score = aggregate_one(work.values_R1, task.aggregate)
    if is_worse(task.top_k[0], task.labels_k[0], score, label):
        replace_worst(task.top_k, task.labels_k, score, label)


@jit
def _plan(task: Task, work: Scratch, deepest: int, costs: Costs) -> tuple[int, float]:
    """Give the depth up to `deepest` that certifies theta at the least predicted cost, ns; 0 if none does.

    How many labels will be scored: as if buckets were drawn at random, and each hit were worth the repetition's greatest excess.
    """
    R, B = task.scores_RB.shape
    theta, K = float(task.top_k[0]), float(task.inverse.n_labels)
    chosen, least_ns, depth = 0, np.inf, 1
    while depth <= deepest:
        base, n_open = _base(work, depth), 0.0
        for r in range(R):
            n_open += min(depth, work.n_R[r])
        if base < theta:
            for r in range(R):
                excess, at = float(work.best_R[r]) - _floor(work, r, depth), r
                while at > 0 and work.excess_R[at - 1] < excess:
                    work.excess_R[at] = work.excess_R[at - 1]
                    at -= 1
                work.excess_R[at] = excess
            n_touched = n_open * K / B
            share = SPARE if n_touched * SPARE <= MAX_CELLS else MAX_CELLS / n_touched
            hits, left, alone, together = 0, theta - base, K, n_touched * share
            while left > 0 and hits < R:
                left -= work.excess_R[hits]
                alone *= (R - hits) / (hits + 1.0) * (n_open / R / B)
                together *= 1 / share / (hits + 1.0)
                hits += 1
            n_scored = 0.0 if left > 0 else alone + (together if hits > 1 else 0.0)
            ns = costs.open * n_open + costs.touch * n_touched + costs.score * R * n_scored
            if ns < least_ns:
                chosen, least_ns = depth, ns
        depth += max(1, depth // 4)
    return chosen, least_ns


@jit
def _base(work: Scratch, depth: int) -> float:
    """Give U and what rounding may add: at least the score of any label that no opened bucket holds."""
    R = len(work.n_R)
    total, size = 0.0, 0.0
    for r in range(R):
        floor = _floor(work, r, depth)
        total += floor
        size += max(abs(floor), abs(float(work.best_R[r])))
    return total + 2 * R * 2.0**-24 * size


@jit
def _sweep(task: Task, work: Scratch, depth: int) -> bool:
    """Score every label whose bound reaches theta; false if there are more than memory was set aside for."""
    R, B = task.scores_RB.shape
    base = _base(work, depth)
    scale = UNIT / (float(task.top_k[0]) - base)
    cells = work.cells[: _clear_cells(work.cells, R * depth * len_of_bucket(task.inverse))]
    for r in range(R):
        floor = _floor(work, r, depth)
        for d in range(min(depth, work.n_R[r])):
            amount = np.int64(min(float(FULL), math.ceil((float(work.scores_RB[r, d]) - floor) * scale)))
            least = _least(float(task.top_k[0]), base, scale)
            work.counts[1] += _touch(task, work, cells, r, work.buckets_RB[r, d], amount, least, base, scale)
        if work.counts[0] > len(work.used):
            return False
    return True


@jit
def _sweep_counts(task: Task, work: Scratch, costs: Costs, budget_ns: float) -> int:
    """Do the same for minimum and median: open, in the repetitions that have few of them, the buckets of theta or more.

    A label of theta or more is in such a bucket in all repetitions, or, for the median, in half of them. Of i repetitions
    opened it is in all i, or in i - R/2.
    """
    R, B = task.scores_RB.shape
    theta, K = task.top_k[0], float(task.inverse.n_labels)
    for r in range(R):
        n, at = _n_from(work.peaks_RM[r], theta), r  # as many buckets, unless most peaks are that high
        if 2 * n > len(work.peaks_RM[r]):
            n = _n_from(task.scores_RB[r], theta)
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
    n_touched = 0.0
    for i in range(chosen):
        n_touched += work.n_R[work.order_R[i]] * K / B
    cells, deepest = work.cells[: _clear_cells(work.cells, n_touched)], 0
    for i in range(chosen):
        r = work.order_R[i]
        n = _collect(task.scores_RB[r], work.peaks_RM[r], theta, work.keys_B)
        deepest = max(deepest, n)
        for d in range(n):
            work.counts[1] += _touch(task, work, cells, r, work.keys_B[d] & 0x7FFFFFFF, 1, chosen - spared, 0.0, 0.0)
        if work.counts[0] > len(work.used):
            return -1
    return deepest
