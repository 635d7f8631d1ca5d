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
GAPS = (301, 132, 57, 23, 10, 4, 1)  # Ciura 2001


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
def find_peaks(row_B: Float32, peaks_M: Float32) -> None:
    """Write the maximum of each 32 buckets, the last of those that are left."""
    whole = len(row_B) // PEAK
    for m in range(whole):
        peaks_M[m] = _peak(row_B, m * PEAK)
    if whole < len(peaks_M):
        best = row_B[whole * PEAK]
        for b in range(whole * PEAK, len(row_B)):
            best = max(best, row_B[b])
        peaks_M[whole] = best


@jit
def find_best(row_B: Float32, peaks_M: Float32, wanted: int, r: int, work: Scratch) -> None:
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
    level = _float(start)
    n = collect(row_B, peaks_M, level, work.keys_B)
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
def collect(row_B: Float32, peaks_M: Float32, level: np.float32, keys: Int64) -> int:
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
def n_from(values: Float32, level: np.float32) -> Any:
    """Count the values of a level or more."""
    n = np.int32(0)  # counted without branches: the loop is vectorised
    for i in range(len(values)):
        n += np.int32(values[i] >= level)
    return n


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
def _ordered(x: np.float32) -> Any:
    """Give an integer that rises with a float32, for all but nan."""
    bits = np.int64(np.float32(x).view(np.int32))
    return bits if bits >= 0 else -(bits & 0x7FFFFFFF) - 1


@jit
def _float(ordered: Any) -> Any:
    """Give back the float32 of an `_ordered` integer."""
    bits = ordered if ordered >= 0 else (-(ordered + 1)) | 0x80000000
    return np.uint32(bits).view(np.float32)
