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

from mach.decoding.only import Only
from mach.decoding.scan import MIN, SUM, aggregate_one
from mach.decoding.topk import Float32, Int64, is_excluded, is_worse, replace_worst
from mach.hashing.inverse import Inverse, Words, first_of_progression, small_buckets
from mach.kernels import jit, lowest_bit

PEAK = 32  # buckets of a peak: two vectors of 64 bytes
GUESS_ROWS = 32  # repetitions that the guess opens
FEW, FEW_ROWS = 10, 8  # up to this k, so many are enough
ASKED_ROWS = 8  # those of them whose labels it may score
UNIT = 2048  # what a cell must reach at first; theta may rise 32 times as far above U until the cells' 16 bits are full
FULL = 65535
SPARE = 4  # cells for each label touched
MIN_CELLS, MAX_CELLS = 1 << 12, 1 << 22
BINS = 256
LOWEST = -0x7F800001  # of -infinity, as an ordered integer
GAPS = (301, 132, 57, 23, 10, 4, 1)  # Ciura 2001
SAMPLE = 64  # buckets that tell the mean of a repetition
CLEAR_GAIN = 0.85  # of a scan's time: after a search predicted to take more, the next samples are not searched
SEARCH_SHARE = 0.1  # of the scan's time, at most, goes into looking for a depth
SOME_HITS = 64  # labels found before they are scored

Float64 = npt.NDArray[np.float64]
Int32 = npt.NDArray[np.int32]
Cells = npt.NDArray[np.uint16]


class Costs(NamedTuple):
    """What each part of a search takes on one core, in ns."""

    read: float  # a bucket score, in the pass for the peaks
    open: float  # an opened bucket: to find it, sort it and begin its labels
    touch: float  # a label of an opened bucket
    score: float  # a repetition of a label that is scored
    scan: float  # a repetition of a label in the scan, for eight samples at once
    median: float  # the same for the median
    coarse: float  # the same for a sum of bytes, for 32 samples at once
    pack: float  # a bucket score made a byte
    invert: float  # a repetition of a label, sorted by bucket for a family that is not arithmetic


class Scratch(NamedTuple):
    """Memory of one thread, used again for each sample."""

    peaks_RM: Float32
    keys_B: Int64
    scores_RB: Float32  # the best scores of each repetition, best first; as many as were asked for
    buckets_RB: Int32
    n_R: Int64  # how many
    best_R: Float32
    below_R: Float32  # at least every score that is not among them
    floor_R: Float64  # t_r
    excess_R: Float64
    order_R: Int64
    rows: Int32  # buckets to open, at most R B
    buckets: Int32
    amounts: Int64
    cells: Cells
    hits: Int64  # labels to score
    bins: Int64
    seen: Int64  # labels scored for this sample, plus 1, by open addressing; 0: empty
    used: Int64  # the places in `seen` that are taken
    counts: Int64  # labels scored, labels touched, and the predicted ns of the sweep
    values_R1: Float32
    buckets_R: Int32


def scratch(n_repetitions: int, n_buckets: int, n_seen: int, longest: int) -> Scratch:
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
        floor_R=np.empty(R),
        excess_R=np.empty(R),
        order_R=np.empty(R, np.int64),
        cells=np.zeros(MAX_CELLS, np.uint16),
        rows=np.empty(R * B, np.int32),
        buckets=np.empty(R * B, np.int32),
        amounts=np.empty(R * B, np.int64),
        hits=np.empty(SOME_HITS + longest, np.int64),
        bins=np.empty(BINS, np.int64),
        seen=np.zeros(2 * n_seen, np.int64),
        used=np.empty(n_seen, np.int64),
        counts=np.zeros(3, np.int64),
        values_R1=np.empty((R, 1), np.float32),
        buckets_R=np.empty(R, np.int32),
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


def _typed_peak(typing_context: Any, row_B: Any, at: Any) -> Any:
    """Give the maximum of row[at : at + 32]."""
    return types.float32(row_B, types.intp), _codegen_peak


def _codegen_from(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    row, at, level = args
    vector, lane = ir.VectorType(ir.FloatType(), PEAK), ir.IntType(32)
    data = context.make_array(signature.args[0])(context, builder, row).data
    values = builder.load(builder.bitcast(builder.gep(data, [at]), vector.as_pointer()), align=4)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), level, ir.Constant(lane, 0))
    levels = builder.shuffle_vector(one, one, ir.Constant(ir.VectorType(lane, PEAK), [0] * PEAK))
    bits = builder.bitcast(builder.fcmp_ordered(">=", values, levels), ir.IntType(PEAK))
    return builder.zext(bits, ir.IntType(64))


def _typed_from(typing_context: Any, row_B: Any, at: Any, level: Any) -> Any:
    """Give a bit for each of row[at : at + 32], set where it is of a level or more."""
    return types.int64(row_B, types.intp, types.float32), _codegen_from


_peak, _from = intrinsic(_typed_peak), intrinsic(_typed_from)


@jit
def prune(
    scores_NRB: Float32, inverse: Inverse, aggregate: int, depth: int, costs: Costs, try_ns: float, budget_ns: float, only: Only,
    work: Scratch, first: int, stop: int, top_Nk: Float32, labels_Nk: Int64, numbers_N3: Int64,
) -> None:  # fmt: skip
    """Search the samples [first, stop); note of each the depth, or -1 where a scan is predicted to be quicker, and the counts.

    Samples of a batch are alike: after one given up, or nearly as slow as a scan, 1, then 3, 7, ... are not searched.

    Args: try_ns, what a search costs until its depth is planned; budget_ns, what a scan costs a sample.
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
        numbers_N3[n, 1:] = work.counts[:2]
        n_failed = n_failed + 1 if numbers_N3[n, 0] < 0 or try_ns + work.counts[2] > CLEAR_GAIN * budget_ns else 0
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
    _guess(task, work, min(depth, 12 + 3 * len(task.top_k) // 4))
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
        more_ns = 2 * R * depth * costs.open  # to find twice as many
        if more_ns > SEARCH_SHARE * budget_ns or more_ns + costs.touch * R * depth * n_a_bucket > min(budget_ns, least_ns):
            break
        depth = min(2 * depth, B)
        for r in range(R):
            _find_best(task.scores_RB[r], work.peaks_RM[r], depth, r, work)
    if chosen == 0 or least_ns > budget_ns:
        return -1
    work.counts[2] = int(least_ns)
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
def _ordered(x: np.float32) -> Any:
    """Give an integer that rises with a float32, for all but nan."""
    bits = np.int64(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1


@jit
def _float(ordered: Any) -> Any:
    """Give back the float32 of an `_ordered` integer."""
    bits = ordered if ordered >= 0 else (-(ordered + 1)) | 0x80000000
    return np.uint32(bits).view(np.float32)


@jit
def _n_from(values: Float32, level: np.float32) -> Any:
    n = np.int32(0)  # counted without branches: the loop is vectorised
    for i in range(len(values)):
        n += np.int32(values[i] >= level)
    return n


@jit
def _find_best(row_B: Float32, peaks_M: Float32, wanted: int, r: int, work: Scratch) -> None:
    """Find about `wanted` best buckets of a repetition, or fewer among many equal scores, and a bound on all the others."""
    B = len(row_B)
    by_peaks = wanted <= len(peaks_M) * 2 // 3  # as many peaks as wanted are as many buckets, or a few more
    best = peaks_M[len(peaks_M) - 1]
    for m in range(0, len(peaks_M) - PEAK + 1, PEAK):
        best = max(best, _peak(peaks_M, m))
    for m in range(len(peaks_M) // PEAK * PEAK, len(peaks_M)):
        best = max(best, peaks_M[m])
    work.best_R[r] = best
    start, end = LOWEST, _ordered(best) + 1  # count(start) >= wanted > count(end)
    middle, stride = _ordered(work.below_R[r - 1]) if r > 0 else end - 1, 1 << 20  # first steps an eighth around the last level
    while end - start > 1:
        if not start < middle < end:
            middle = start + (end - start) // 2
        n = _n_from(peaks_M, _float(middle)) if by_peaks else _n_from(row_B, _float(middle))
        if n < wanted:
            end = middle
            middle -= stride
        else:
            start = middle
            if n <= wanted + wanted // 2:
                break
            middle += stride
        if start > LOWEST and end <= _ordered(best):
            middle = start + (end - start) // 2
        stride *= 2
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
    """Sort some by Shell's method, many by the library."""
    if len(keys) > 4 * GAPS[0]:
        keys.sort()
        return
    for gap in GAPS:
        for i in range(gap, len(keys)):
            key, at = keys[i], i
            while at >= gap and keys[at - gap] > key:
                keys[at] = keys[at - gap]
                at -= gap
            keys[at] = key


@jit
def _collect(row_B: Float32, peaks_M: Float32, level: np.float32, keys: Int64) -> int:
    """Gather the buckets of a level or more as keys, score falling, then bucket; give their number."""
    n = 0
    for m in range(len(peaks_M)):
        if not peaks_M[m] >= level:
            continue
        if (m + 1) * PEAK <= len(row_B):
            bits = _from(row_B, m * PEAK, level)
            while bits:
                b = m * PEAK + lowest_bit(bits)
                bits &= bits - 1
                keys[n] = (-_ordered(row_B[b]) << 32) | b
                n += 1
        else:
            for b in range(m * PEAK, len(row_B)):
                if row_B[b] >= level:
                    keys[n] = (-_ordered(row_B[b]) << 32) | b
                    n += 1
    return n


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
def _cells_for(work: Scratch, n_wanted: float) -> Cells:
    """Give about so many empty cells, a power of two."""
    n = MIN_CELLS
    while n < n_wanted and n < MAX_CELLS:
        n *= 2
    cells = work.cells[:n]
    cells[:] = 0
    return cells


@jit
def _guess(task: Task, work: Scratch, depth: int) -> None:
    """Score the most promising labels of a few repetitions, at least k of them where there are as many.

    Promising by their score if the buckets that are not opened gave a mean score.
    """
    R = len(task.scores_RB)
    n_rows, widest = min(R, GUESS_ROWS if len(task.top_k) > FEW else FEW_ROWS), 0.0
    for i in range(n_rows):
        r = i * R // n_rows
        work.floor_R[r] = min(_mean(task.scores_RB[r, :SAMPLE]), float(work.best_R[r]))
        widest = max(widest, float(work.best_R[r]) - work.floor_R[r])
    if not widest > 0 or not widest < np.inf:
        return
    scale = FULL / (n_rows + 1) / widest
    cells = _cells_for(work, SPARE * n_rows * depth * len_of_bucket(task.inverse))
    n_open = n_asked = 0
    for i in range(n_rows):
        n_open = _list_buckets(work, i * R // n_rows, depth, scale, n_open)
        n_asked = n_open if i < ASKED_ROWS else n_asked
    for i in range(n_open):
        work.amounts[i] &= -2  # even, for the count
    _open(task, work, cells, n_open, FULL + 1, 0.0, 0.0)
    _count(task, work, cells, n_asked)
    wanted, n, at = 2 * (len(task.top_k) + 4 + len(task.without)), 0, BINS
    while at > 0 and n < wanted:
        at -= 1
        n += work.bins[at]
    work.amounts[:n_asked] = 0
    _open(task, work, cells, n_asked, max(1, at * (FULL + 1) // BINS), 0.0, 0.0)


@jit
def _mean(values: Float32) -> float:
    total = 0.0
    for i in range(len(values)):
        total += float(values[i])
    return total / len(values)


@jit
def _after(label: np.uint64, step: np.uint64, p: np.uint64) -> np.uint64:
    label += step
    return label - p if label >= p else label


@jit
def _list_buckets(work: Scratch, r: int, depth: int, scale: float, n_open: int) -> int:
    """Append the best buckets of a repetition to those to be opened, with their scaled excess; give the length of the list."""
    scores_D, buckets_D, floor = work.scores_RB[r], work.buckets_RB[r], work.floor_R[r]
    rows, buckets, amounts = work.rows, work.buckets, work.amounts
    for d in range(min(depth, work.n_R[r])):
        rows[n_open], buckets[n_open] = r, buckets_D[d]
        amounts[n_open] = np.int64(min(float(FULL), math.ceil((float(scores_D[d]) - floor) * scale)))
        n_open += 1
    return n_open


@jit
def _count(task: Task, work: Scratch, cells: Cells, n_open: int) -> None:
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
def _open(task: Task, work: Scratch, cells: Cells, n_open: int, least: int, base: float, scale: float) -> None:
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
def _offer(task: Task, work: Scratch, n_hits: int) -> None:
    """Score the labels of work.hits that were not yet, and put into the heap those better than the worst there."""
    scores_RB, inverse, allowed, top_k, labels_k = task.scores_RB, task.inverse, task.allowed, task.top_k, task.labels_k
    seen, used, counts, values_R1 = work.seen, work.used, work.counts, work.values_R1
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
            values_R1[r, 0] = scores_RB[r, buckets_R[r]]
        score: Any = aggregate_one(values_R1, task.aggregate)
        if is_worse(top_k[0], labels_k[0], score, label):
            replace_worst(top_k, labels_k, score, label)


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
    cells = _cells_for(work, SPARE * R * depth * len_of_bucket(task.inverse))
    n_open = 0
    for r in range(R):
        n_open = _list_buckets(work, r, depth, scale, n_open)
    _open(task, work, cells, n_open, UNIT, base, scale)
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
    work.counts[2] = int(least_ns)
    n_touched = 0.0
    for i in range(chosen):
        n_touched += work.n_R[work.order_R[i]] * K / B
    listed = deepest = 0
    for i in range(chosen):
        r = work.order_R[i]
        n = _collect(task.scores_RB[r], work.peaks_RM[r], theta, work.keys_B)
        deepest = max(deepest, n)
        for d in range(n):
            work.rows[listed], work.buckets[listed], work.amounts[listed] = r, work.keys_B[d] & 0x7FFFFFFF, 1
            listed += 1
    _open(task, work, _cells_for(work, SPARE * n_touched), listed, chosen - spared, 0.0, 0.0)
    return deepest if work.counts[0] <= len(work.used) else -1
