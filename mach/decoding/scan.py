"""The exact scan: score every label from R bucket rows and keep the k best, without ever holding (N, K).

Eight samples are scored at once. Their bucket scores are laid side by side, so that one bucket of the table answers all
eight with one 32-byte load, one addition and one comparison; a block of labels is scored before it is compared, so that its
partial sums and the rows of one repetition stay in the L2 cache. Sums run over r = 0..R-1 in float32: any other exact path
that keeps this order gives the same bits.

Axes: N samples, R repetitions, B buckets, K labels, M candidate labels, Q samples of a group (eight), J labels of a block.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mach.config import Estimator
from mach.decoding.only import Lists, no_lists
from mach.decoding.topk import BLOCK, GROUP, Float32, Int64, TopK, check_k, frozen, is_excluded, replace_worst, search
from mach.errors import ConfigError
from mach.kernels import N_THREADS, jit

Buckets = npt.NDArray[np.unsignedinteger[Any]]

SUM, MIN, MEDIAN = range(3)
MEDIAN_BLOCK = 128  # labels whose R values are held and sorted at once: 4 KiB a repetition, in the L1 or L2 cache
AGGREGATES = {"mean": SUM, "logits": SUM, "log-probs": SUM, "min": MIN, "median": MEDIAN}


def scan_topk(
    scores_NRB: Float32,
    table_RK: Buckets,
    k: int,
    *,
    estimator: Estimator,
    without: Lists | None = None,
    n_threads: int = N_THREADS,
) -> TopK:
    """Give the k best of all labels, each scored by the sum (mean, logits, log-probs), minimum or median of its buckets.

    Holds the result, and R (8 B) + 8 * 4096 floats a thread.

    Args:    scores_NRB, float32 from `bucket_scores`, finite; table_RK, unsigned, below B (not checked: it would cost a scan).
             without, labels that each sample may not find, of which there must be at most K - k.
    Raises:  ConfigError if k is outside [1, K], or the repetitions of scores and table differ.
    """
    check_k(k, table_RK.shape[1])
    check_repetitions(scores_NRB, table_RK)
    starts_N, without_L = without or no_lists(len(scores_NRB))
    inputs = (frozen(scores_NRB), frozen(table_RK), AGGREGATES[estimator], starts_N, without_L)
    return search(_offer_labels, inputs, len(scores_NRB), table_RK.shape[1], k, n_threads)


def score_labels(scores_NRB: Float32, table_RK: Buckets, labels_NM: Int64, *, estimator: Estimator) -> Float32:
    """Score given candidates, (N, M), to the same bits as the scan.

    Raises: ConfigError if a label is outside [0, K), or the repetitions of scores and table differ.
    """
    check_repetitions(scores_NRB, table_RK)
    n_labels = table_RK.shape[1]
    if labels_NM.size and not (labels_NM.min() >= 0 and labels_NM.max() < n_labels):
        raise ConfigError(f"labels must lie in [0, {n_labels}), got {labels_NM.min()}..{labels_NM.max()}")
    out_NM = np.empty(labels_NM.shape, dtype=np.float32)
    _score_labels(frozen(scores_NRB), frozen(table_RK), frozen(labels_NM), AGGREGATES[estimator], out_NM)
    return out_NM


def check_repetitions(scores_NRB: Float32, table_RK: Buckets) -> None:
    """Raise ConfigError unless scores and table are of as many repetitions."""
    if scores_NRB.shape[1] != len(table_RK):
        raise ConfigError(
            f"the scores hold {scores_NRB.shape[1]} repetitions, the table {len(table_RK)}: select the same of both"
        )


def _eight(name: str) -> Any:
    """Make an instruction on eight float32 at once: numba itself does not vectorise so short an inner loop.

    "copy", "add", "min": out[i:i+8] = in[j:j+8], the sum, the minimum of both. "above": whether any out[i+q] > in[j+q].
    """

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        vector = ir.VectorType(ir.FloatType(), GROUP)

        def pointer(array: int, index: int) -> Any:
            data = context.make_array(signature.args[array])(context, builder, args[array]).data
            return builder.bitcast(builder.gep(data, [args[index]]), vector.as_pointer())

        left, right = builder.load(pointer(0, 1), align=4), builder.load(pointer(2, 3), align=4)
        if name == "above":
            bits = builder.bitcast(builder.fcmp_ordered(">", left, right), ir.IntType(GROUP))
            return builder.icmp_unsigned("!=", bits, ir.Constant(ir.IntType(GROUP), 0))
        if name == "add":
            right = builder.fadd(left, right)
        elif name == "min":
            right = builder.select(builder.fcmp_ordered("<", right, left), right, left)
        builder.store(right, pointer(0, 1), align=4)
        return context.get_dummy_value()

    def typed(typing_context: Any, out: Any, i: Any, source: Any, j: Any) -> Any:
        result = types.boolean if name == "above" else types.void
        return result(out, types.intp, source, types.intp), codegen

    return intrinsic(typed)


copy_eight, add_eight, min_eight, above_eight = _eight("copy"), _eight("add"), _eight("min"), _eight("above")


@jit
def _offer_labels(
    scores_NRB: Float32, table_RK: Buckets, aggregate: int, starts_N: Int64, without_L: Int64,
    first: int, start: int, stop: int, top_Nk: Float32, labels_Nk: Int64,
) -> None:  # fmt: skip
    """Push labels [start, stop) of the samples [first, first + 8) into their heaps."""
    n_samples, R = min(GROUP, len(scores_NRB) - first), len(table_RK)
    packed_RBQ = _pack(scores_NRB[first : first + n_samples])
    n_rows, n_block = (R, MEDIAN_BLOCK) if aggregate == MEDIAN else (1, BLOCK)
    values_rJQ = np.empty((n_rows, n_block * GROUP), dtype=np.float32)
    floor_Q = np.full(GROUP, np.inf, dtype=np.float32)  # nothing is above the floor of an absent sample
    floor_Q[:n_samples] = -np.inf
    for block in range(start, stop, n_block):
        n_labels = min(n_block, stop - block)
        _aggregate(packed_RBQ, table_RK[:, block : block + n_labels], aggregate, values_rJQ)
        values_JQ = values_rJQ[0]
        for j in range(n_labels):
            if above_eight(values_JQ, j * GROUP, floor_Q, 0):
                for q in range(n_samples):
                    if values_JQ[j * GROUP + q] > floor_Q[q] and not is_excluded(
                        without_L[starts_N[first + q] : starts_N[first + q + 1]], block + j
                    ):
                        replace_worst(top_Nk[first + q], labels_Nk[first + q], values_JQ[j * GROUP + q], block + j)
                        floor_Q[q] = top_Nk[first + q, 0]


@jit
def _pack(scores_QRB: Float32) -> Float32:
    """Lay the samples' scores of a bucket side by side: (R, B * 8), zeros for absent samples."""
    Q, R, B = scores_QRB.shape
    packed_RBQ = np.zeros((R, B * GROUP), dtype=np.float32)
    for r in range(R):
        for q in range(Q):
            for b in range(B):
                packed_RBQ[r, b * GROUP + q] = scores_QRB[q, r, b]
    return packed_RBQ


@jit
def _aggregate(packed_RBQ: Float32, table_RJ: Buckets, aggregate: int, values_rJQ: Float32) -> None:
    """Score a block of labels for a group of samples into row 0 of the values; the median needs R rows to work in."""
    R, J = table_RJ.shape
    for r in range(R):
        buckets_J, scores_BQ = table_RJ[r], packed_RBQ[r]
        values_JQ = values_rJQ[r if aggregate == MEDIAN else 0]
        if r == 0 or aggregate == MEDIAN:
            for j in range(J):
                copy_eight(values_JQ, j * GROUP, scores_BQ, np.intp(buckets_J[j]) * GROUP)
        elif aggregate == SUM:
            for j in range(J):
                add_eight(values_JQ, j * GROUP, scores_BQ, np.intp(buckets_J[j]) * GROUP)
        else:
            for j in range(J):
                min_eight(values_JQ, j * GROUP, scores_BQ, np.intp(buckets_J[j]) * GROUP)
    if aggregate == MEDIAN:
        _median(values_rJQ, J * GROUP)


@jit
def _median(values_Rn: Float32, n: int) -> None:
    """Put the median of each of the first n columns into row 0, sorting all columns at once, row against row, without branches.

    The rows to compare are those of Batcher's merge exchange, for any R: Knuth, TAOCP volume 3, algorithm 5.2.2M.
    """
    R, size = len(values_Rn), 1  # of the sorted runs
    while size < R:
        step = size
        while step > 0:
            for start in range(step % size, R - step, 2 * step):
                for r in range(start, min(start + step, R - step)):
                    if r // (2 * size) == (r + step) // (2 * size):
                        _exchange(values_Rn[r], values_Rn[r + step], n)
            step //= 2
        size *= 2
    for i in range(n):
        values_Rn[0, i] = (values_Rn[(R - 1) // 2, i] + values_Rn[R // 2, i]) * np.float32(0.5)


@jit
def _exchange(low_n: Float32, high_n: Float32, n: int) -> None:
    for i in range(n):
        a, b = low_n[i], high_n[i]
        low_n[i] = a if a < b else b
        high_n[i] = b if a < b else a


@jit
def aggregate_one(values_R: Float32, aggregate: int) -> Any:
    """Score one label from its R bucket scores, to the bits of the scan."""
    if aggregate == MEDIAN:
        return _median_of(values_R)
    score = values_R[0]
    for r in range(1, len(values_R)):
        score = score + values_R[r] if aggregate == SUM else min(score, values_R[r])
    return score


@jit
def _median_of(values_R: Float32) -> Any:
    """Find the one or two in the middle by counting how many are less, and how many are equal: loops that vectorise."""
    below, above = (len(values_R) - 1) // 2, len(values_R) // 2
    low = high = values_R[0]
    for r in range(len(values_R)):
        x, n_less, n_equal = values_R[r], np.int32(0), np.int32(0)
        for i in range(len(values_R)):
            n_less += np.int32(values_R[i] < x)
            n_equal += np.int32(values_R[i] == x)
        if n_less <= below < n_less + n_equal:
            low = x
        if n_less <= above < n_less + n_equal:
            high = x
    return (low + high) * np.float32(0.5)


@jit
def _score_labels(scores_NRB: Float32, table_RK: Buckets, labels_NM: Int64, aggregate: int, out_NM: Float32) -> None:
    R = len(table_RK)
    values_R = np.empty(R, dtype=np.float32)
    for n in range(len(labels_NM)):
        for m in range(labels_NM.shape[1]):
            for r in range(R):
                values_R[r] = scores_NRB[n, r, table_RK[r, labels_NM[n, m]]]
            out_NM[n, m] = aggregate_one(values_R, aggregate)
