"""The best buckets of a repetition: the maximum of each 32, the peaks, says which buckets to look at.

Numba's cache does not see a change in another file: after editing this one, delete `__pycache__`.

Axes: B buckets, M peaks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from mach.decoding.topk import Float32, Int64
from mach.decoding.work import PEAK, Scratch
from mach.kernels import jit, lowest_bit

LOWEST = -0x7F800001  # of -infinity, as an ordered integer
FEW_KEYS = 512  # up to so many are put in place by counting, more are sorted


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
def find_peaks(scores_RB: Float32, peaks_RM: Float32) -> None:
    """Write the maximum of each 32 buckets, the last of those that are left."""
    whole = scores_RB.shape[1] // PEAK
    for r in range(len(scores_RB)):
        row_B, peaks_M = scores_RB[r], peaks_RM[r]
        for m in range(whole):
            peaks_M[m] = _peak(row_B, m * PEAK)
        if whole < len(peaks_M):
            best = row_B[whole * PEAK]
            for b in range(whole * PEAK, len(row_B)):
                best = max(best, row_B[b])
            peaks_M[whole] = best


@jit
def find_best(scores_RB: Float32, wanted: int, work: Scratch) -> None:
    """Find about `wanted` best buckets of each repetition, or fewer among many equal scores, and a bound on all the others."""
    peaks_RM, keys_B, scores_RD, buckets_RD = work.peaks_RM, work.keys_B, work.scores_RB, work.buckets_RB
    best_R, below_R, n_R = work.best_R, work.below_R, work.n_R
    around = np.float32(np.inf)  # the level of the repetition before: a good first guess
    for r in range(len(scores_RB)):
        row_B, peaks_M, scores_D, buckets_D = scores_RB[r], peaks_RM[r], scores_RD[r], buckets_RD[r]
        best_R[r] = _max(peaks_M)
        level, around = _level(row_B, peaks_M, best_R[r], wanted, around)
        n = collect(row_B, peaks_M, level, keys_B)
        keys = keys_B[:n]
        if n > FEW_KEYS:
            keys.sort()
        for i in range(n):
            place = i if n > FEW_KEYS else _n_below(keys, keys[i])
            scores_D[place] = _float(-(keys[i] >> 32))
            buckets_D[place] = keys[i] & 0x7FFFFFFF
        if n == len(row_B):
            n -= 1
            around = scores_D[n]
        below_R[r], n_R[r] = around, n


@jit
def _max(values: Float32) -> Any:
    best, whole = values[len(values) - 1], len(values) // PEAK * PEAK
    for first in range(0, whole, PEAK):
        best = max(best, _peak(values, first))
    for i in range(whole, len(values)):
        best = max(best, values[i])
    return best


@jit
def _level(row_B: Float32, peaks_M: Float32, best: np.float32, wanted: int, around: np.float32) -> tuple[Any, Any]:
    """Give a level that about `wanted` buckets reach, and a bound on all that do not."""
    by_peaks = wanted <= len(peaks_M) * 2 // 3  # as many peaks as wanted are as many buckets, or a few more
    start, end = LOWEST, _ordered(best) + 1  # count(start) >= wanted > count(end)
    middle, stride = min(_ordered(around), end - 1), 1 << 20  # first steps an eighth around the last level
    while end - start > 1:
        if not start < middle < end:
            middle = start + (end - start) // 2
        n = n_from(peaks_M, _float(middle)) if by_peaks else n_from(row_B, _float(middle))
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
    if end - start == 1 and n_from(row_B, _float(start)) > 2 * wanted + PEAK:
        start = end  # ties: none of them, as they cannot be told apart
    return _float(start), _float(start - 1)


@jit
def collect(row_B: Float32, peaks_M: Float32, level: np.float32, keys: Int64) -> Any:
    """Gather the buckets of a level or more as keys, score falling, then bucket; give their number."""
    n = np.int64(0)
    for first in range(0, len(peaks_M), PEAK):
        high = _bits_from(peaks_M, first, level)
        while high:
            start = (first + lowest_bit(high)) * PEAK
            high &= high - 1
            bits = _bits_from(row_B, start, level)
            while bits:
                b = start + lowest_bit(bits)
                bits &= bits - 1
                keys[n] = (-_ordered(row_B[b]) << 32) | b
                n += 1
    return n


@jit
def _bits_from(values: Float32, at: int, level: np.float32) -> Any:
    """Give a bit for each of values[at : at + 32], or of those that are left, set where it is of a level or more."""
    if at + PEAK <= len(values):
        return _from(values, at, level)
    bits = np.int64(0)
    for i in range(at, len(values)):
        bits |= np.int64(values[i] >= level) << (i - at)
    return bits


@jit
def n_from(values: Float32, level: np.float32) -> Any:
    """Count the values of a level or more."""
    n = np.int32(0)  # counted without branches: the loop is vectorised
    for i in range(len(values)):
        n += np.int32(values[i] >= level)
    return n


@jit
def _n_below(keys: Int64, key: int) -> Any:
    """Count the keys below one, without branches."""
    n = np.int64(0)
    for i in range(len(keys)):
        n += np.int64(keys[i] < key)
    return n


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
