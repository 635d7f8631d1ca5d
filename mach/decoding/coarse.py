"""The scan in bytes: sums of rounded scores dismiss most labels, 32 samples a load; what is left is scored as `scan` does.

A sample's score s becomes the byte q = 1 + floor((s - f_r) / d): f_r is the least score of its repetition, d the widest range of
a repetition over 254. A label's score less sum f_r is below d sum q and at least d (sum q - R). So where k labels have a sum of
v or more, one whose sum is v - R or less is not among the k best. A sample with too many labels left, as where many are equal or
one bucket dwarfs all others, is scanned.

Rounding: a float32 sum of R terms is within R 2**-24 sum max |s_r| of the exact one, of which twice is allowed to each of the two
labels compared; a byte's own error is below 2**-22 of it.

Axes: N samples, R repetitions, B buckets, K labels, k labels kept, Q samples of a group, J labels of a block, P parts of the
labels, C candidates.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from mach.decoding.only import Int64, Lists, lists_of, no_lists
from mach.decoding.scan import Buckets, check_repetitions, scan_topk
from mach.decoding.topk import GROUP, NO_LABEL, Float32, TopK, check_k, finish, frozen, is_excluded, is_worse, replace_worst
from mach.kernels import N_THREADS, in_threads, jit, lowest_bit

LANES = 32  # samples a task takes: a bucket's bytes are one 32-byte load
BLOCK = 4096  # labels whose sums are held: 256 KiB of uint16
AT_ONCE = 8  # buckets transposed at once
FULL = 255
MOST = 65535  # a sum that may be more
HELD, SPARE = 16, 4096  # room for 16 k candidates and so many
FIRST, FIRST_SPARE = 4, 64  # at 4 k and so many they are thinned first, then, if more than 3/4 stay, at twice as many
TINY = 1e-36  # a range whose reciprocal is still finite

Bytes = npt.NDArray[np.uint8]
Sums = npt.NDArray[np.uint16]


def _pointer(context: Any, builder: Any, signature: Any, args: Any, array: int, index: Any, vector: Any) -> Any:
    data = context.make_array(signature.args[array])(context, builder, args[array]).data
    return builder.bitcast(builder.gep(data, [index]), vector.as_pointer())


_BYTES, _SUMS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(ir.IntType(16), LANES)


def _codegen_add(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    at = _pointer(context, builder, signature, args, 0, args[1], _SUMS)
    name = f"llvm.uadd.sat.v{LANES}i16"
    add = cgutils.get_or_insert_function(builder.module, ir.FunctionType(_SUMS, [_SUMS, _SUMS]), name)
    total = builder.load(at, align=2)
    for place in args[3:]:
        bucket = builder.load(_pointer(context, builder, signature, args, 2, place, _BYTES), align=1)
        total = builder.call(add, [total, builder.zext(bucket, _SUMS)])
    builder.store(total, at, align=2)
    return context.get_dummy_value()


def _typed_add(typing_context: Any, sums: Any, i: Any, packed: Any, a: Any) -> Any:
    """Add packed[a : a + 32] to sums[i : i + 32], at most 65,535."""
    return types.void(sums, types.intp, packed, types.intp), _codegen_add


def _typed_add_four(typing_context: Any, sums: Any, i: Any, packed: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Do so for four places."""
    return types.void(sums, types.intp, packed, types.intp, types.intp, types.intp, types.intp), _codegen_add


def _typed_reach(typing_context: Any, sums: Any, i: Any, least_Q: Any) -> Any:
    """Give a bit for each of sums[i : i + 32], set where it is at least what is asked."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        total = builder.load(_pointer(context, builder, signature, args, 0, args[1], _SUMS), align=2)
        least = builder.load(_pointer(context, builder, signature, args, 2, ir.Constant(ir.IntType(64), 0), _SUMS), align=2)
        bits = builder.bitcast(builder.icmp_unsigned(">=", total, least), ir.IntType(LANES))
        return builder.zext(bits, ir.IntType(64))

    return types.int64(sums, types.intp, least_Q), codegen


def _typed_transpose(typing_context: Any, rows: Any, i: Any, n: Any, packed: Any, j: Any) -> Any:
    """Write 8 bytes of each of the 32 rows of length n, from their i-th on, to packed[j:], those of a place side by side."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        lane = ir.IntType(32)
        vectors = []
        for q in range(LANES):
            place = builder.add(args[1], builder.mul(args[2], ir.Constant(ir.IntType(64), q)))
            some = ir.VectorType(ir.IntType(8), AT_ONCE)
            vectors.append(builder.load(_pointer(context, builder, signature, args, 0, place, some), align=1))
        width = AT_ONCE
        while len(vectors) > 1:  # element by element, the first half with the second
            zipped = [x for i in range(width) for x in (i, width + i)]
            order = ir.Constant(ir.VectorType(lane, 2 * width), zipped)
            half = len(vectors) // 2
            vectors = [builder.shuffle_vector(vectors[q], vectors[q + half], order) for q in range(half)]
            width *= 2
        out = _pointer(context, builder, signature, args, 3, args[4], vectors[0].type)
        builder.store(vectors[0], out, align=1)
        return context.get_dummy_value()

    return types.void(rows, types.intp, types.intp, packed, types.intp), codegen


_add, _add_four, _reach, _transpose = map(intrinsic, (_typed_add, _typed_add_four, _typed_reach, _typed_transpose))


def coarse_topk(
    scores_NRB: Float32,
    table_RK: Buckets,
    k: int,
    *,
    without: Lists | None = None,
    n_threads: int = N_THREADS,
) -> TopK:
    """Give what `scan_topk` gives for an estimator that is a sum, from the same arguments.

    Holds, a thread, 32 B (R + 1) bytes, 256 KiB and 32 (16 k + 4096) candidates of 10 bytes.

    Raises: ConfigError if k is outside [1, K], or the repetitions of scores and table differ.
    """
    check_k(k, table_RK.shape[1])
    check_repetitions(scores_NRB, table_RK)
    N, K = len(scores_NRB), table_RK.shape[1]
    lists = without or no_lists(N)
    firsts = range(0, N, LANES)
    n_parts = min(-(-n_threads // max(1, len(firsts))), -(-K // BLOCK))
    cuts = [p * K // n_parts for p in range(n_parts + 1)]
    scores_PNk, labels_PNk = np.full((n_parts, N, k), -np.inf, np.float32), np.full((n_parts, N, k), NO_LABEL)
    lost_PN = np.zeros((n_parts, N), np.uint8)
    inputs = (frozen(scores_NRB), frozen(table_RK), *lists)
    tasks = [
        (*inputs, first, cuts[p], cuts[p + 1], scores_PNk[p], labels_PNk[p], lost_PN[p])
        for first in firsts
        for p in range(n_parts)
    ]
    in_threads(_offer_group, tasks, n_threads)
    in_threads(finish, [(scores_PNk, labels_PNk, first) for first in range(0, N, GROUP)], n_threads)
    lost = np.flatnonzero(lost_PN.any(axis=0))
    if len(lost):
        found = scan_topk(
            scores_NRB[lost], table_RK, k, estimator="logits", without=lists_of(lists, lost), n_threads=n_threads
        )  # fmt: skip
        scores_PNk[0, lost], labels_PNk[0, lost] = found.scores, found.labels
    return TopK(labels_PNk[0], scores_PNk[0])


@jit
def _offer_group(
    scores_NRB: Float32, table_RK: Buckets, starts_N: Int64, without_L: Int64,
    first: int, start: int, stop: int, top_Nk: Float32, labels_Nk: Int64, lost_N: Bytes,
) -> None:  # fmt: skip
    """Push labels [start, stop) of the samples [first, first + 32) into their heaps, but for samples that get lost."""
    Q, R, B, k = min(LANES, len(scores_NRB) - first), len(table_RK), scores_NRB.shape[2], top_Nk.shape[1]
    packed, slack_Q = np.zeros(R * B * LANES, np.uint8), np.zeros(LANES, np.int64)
    _pack(scores_NRB[first : first + Q], packed, slack_Q)
    sums = np.empty(BLOCK * LANES, np.uint16)
    n_held = HELD * k + SPARE
    held_QC, sums_QC = np.empty((Q, n_held), np.int64), np.empty((Q, n_held), np.uint16)
    n_Q, least_Q = np.zeros(LANES, np.int64), np.zeros(LANES, np.uint16)
    full_Q = np.full(LANES, min(n_held, FIRST * k + FIRST_SPARE))
    alive = (np.int64(1) << Q) - 1
    for at in range(start, stop, BLOCK):
        J = min(BLOCK, stop - at)
        _add_up(packed, B, table_RK[:, at : at + J], sums)
        for j in range(J):
            bits = _reach(sums, j * LANES, least_Q) & alive
            while bits:
                q = lowest_bit(bits)
                bits &= bits - 1
                if is_excluded(without_L[starts_N[first + q] : starts_N[first + q + 1]], at + j):
                    continue
                held_QC[q, n_Q[q]], sums_QC[q, n_Q[q]] = at + j, sums[j * LANES + q]
                n_Q[q] += 1
                if n_Q[q] == full_Q[q]:
                    n_Q[q], least_Q[q] = _thin(held_QC[q], sums_QC[q], n_Q[q], k, slack_Q[q])
                    if 4 * n_Q[q] > 3 * full_Q[q]:
                        if full_Q[q] == n_held:
                            alive ^= np.int64(1) << q
                            lost_N[first + q] = 1
                        full_Q[q] = min(2 * full_Q[q], n_held)
        if alive == 0:
            return
    values_C = np.empty(n_held, np.float32)
    for q in range(Q):
        if (alive >> q) & 1:
            n, _ = _thin(held_QC[q], sums_QC[q], n_Q[q], k, slack_Q[q])
            _offer(scores_NRB[first + q], table_RK, held_QC[q, :n], values_C, top_Nk[first + q], labels_Nk[first + q])


@jit
def _thin(held_C: Int64, sums_C: Sums, n: int, k: int, slack: int) -> tuple[int, Any]:
    """Keep, of the first n candidates, those that may be among the k best; give their number and the least sum of any other."""
    least = np.int64(0)
    if n > k:
        for bit in range(15, -1, -1):  # the k-th greatest sum, from its highest bit down
            above = np.int64(0)
            for c in range(n):
                above += sums_C[c] >= least + (1 << bit)
            if above >= k:
                least += 1 << bit
    least = max(np.int64(0), least - slack)
    n_kept = 0
    for c in range(n):
        if sums_C[c] >= least:
            held_C[n_kept], sums_C[n_kept] = held_C[c], sums_C[c]
            n_kept += 1
    return n_kept, np.uint16(least)


@jit
def _offer(scores_RB: Float32, table_RK: Buckets, held_C: Int64, values_C: Float32, top_k: Float32, labels_k: Int64) -> None:
    """Score the candidates exactly, a repetition at a time, and keep the best in the heap."""
    for r in range(len(table_RK)):
        for c in range(len(held_C)):
            score = scores_RB[r, table_RK[r, held_C[c]]]
            values_C[c] = score if r == 0 else values_C[c] + score
    for c in range(len(held_C)):
        if is_worse(top_k[0], labels_k[0], values_C[c], held_C[c]):
            replace_worst(top_k, labels_k, values_C[c], held_C[c])


@jit
def _pack(scores_QRB: Float32, packed: Bytes, slack_Q: Int64) -> None:
    """Lay the samples' bytes of a bucket side by side, (R, B, 32), and say how far below the k-th best sum a label may be."""
    Q, R, B = scores_QRB.shape
    floor_QR, step_Q, rows = np.empty((Q, R), np.float32), np.zeros(Q, np.float32), np.zeros(LANES * B, np.uint8)
    for q in range(Q):
        size, widest = 0.0, 0.0
        for r in range(R):
            least, best = _range(scores_QRB[q, r])
            floor_QR[q, r] = least
            size += max(abs(float(least)), abs(float(best)))
            widest = max(widest, float(best) - float(least))
        if widest > TINY:
            step_Q[q] = np.float32((FULL - 1) / widest)
        slack_Q[q] = int(min(MOST, 1 + math.ceil(R * (1 + 2.0**-12 + 4 * 2.0**-24 * size * float(step_Q[q])))))
    for r in range(R):
        for q in range(Q):
            _round(scores_QRB[q, r], floor_QR[q, r], step_Q[q], rows[q * B : (q + 1) * B])
        at = r * B * LANES
        for b in range(0, B - AT_ONCE + 1, AT_ONCE):
            _transpose(rows, b, B, packed, at + b * LANES)
        for b in range(B // AT_ONCE * AT_ONCE, B):
            for q in range(Q):
                packed[at + b * LANES + q] = rows[q * B + b]


@jit
def _range(row_B: Float32) -> tuple[Any, Any]:
    """Give the minimum and maximum, by integers that rise with the floats: those are compared many at a time."""
    least, best = np.int32(2**31 - 1), np.int32(-(2**31))
    bits_B = row_B.view(np.int32)
    for b in range(len(bits_B)):
        ordered = np.int32(bits_B[b] ^ ((bits_B[b] >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        least, best = min(least, ordered), max(best, ordered)
    return _float(least), _float(best)


@jit
def _float(ordered: np.int32) -> Any:
    return np.int32(ordered ^ ((ordered >> np.int32(31)) & np.int32(0x7FFFFFFF))).view(np.float32)


@jit
def _round(row_B: Float32, floor: np.float32, step: np.float32, out_B: Bytes) -> None:
    for b in range(len(row_B)):
        out_B[b] = np.uint8(np.int32(min((row_B[b] - floor) * step, np.float32(FULL - 1))) + np.int32(1))


@jit
def _add_up(packed: Bytes, n_buckets: int, table_RJ: Buckets, sums: Sums) -> None:
    """Add up the bytes of a block of labels, four repetitions at a time."""
    (R, J), B = table_RJ.shape, n_buckets
    sums[: J * LANES] = 0
    for r in range(0, R - 3, 4):
        one_J, two_J, three_J, four_J = table_RJ[r], table_RJ[r + 1], table_RJ[r + 2], table_RJ[r + 3]
        for j in range(J):
            _add_four(
                sums,
                j * LANES,
                packed,
                (r * B + np.intp(one_J[j])) * LANES,
                ((r + 1) * B + np.intp(two_J[j])) * LANES,
                ((r + 2) * B + np.intp(three_J[j])) * LANES,
                ((r + 3) * B + np.intp(four_J[j])) * LANES,
            )
    for r in range(R // 4 * 4, R):
        for j in range(J):
            _add(sums, j * LANES, packed, (r * B + np.intp(table_RJ[r, j])) * LANES)
