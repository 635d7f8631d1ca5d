"""Raw head outputs -> what is aggregated over the repetitions, in place.

An estimator is a transform of bucket outputs, here, followed by a sum, a minimum or a median over r, in `scan`. The unbiased
mean's map B/(B-1) (P - 1/B) / R is applied here too, so that its score is a plain sum and equal scores are equal bits.

Axes: N samples, R repetitions, B buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from mach.config import Estimator, Loss
from mach.errors import ConfigError
from mach.kernels import N_THREADS, in_threads, jit, jit_ieee

Float32 = npt.NDArray[np.float32]

LIMIT = np.float32(1e30)  # no sum over fewer than 10**8 repetitions of such outputs overflows float32
RAW, SIGMOID, SOFTMAX, LOG_SIGMOID, LOG_SOFTMAX = range(5)
GOOD = -1

ZERO, ONE = np.float32(0), np.float32(1)
LOG2_E, LN2_HIGH, LN2_LOW = np.float32(1.44269504), np.float32(0.693359375), np.float32(-2.12194440e-4)
ROUND = np.float32(3 << 22)  # adding it rounds a float32 to an integer, held in its lowest bits
ROUND_BITS = np.int64(ROUND.view(np.int32)) - 127  # 127: the bias of the exponent
EXP = tuple(
    map(np.float32, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1))
)
ATANH = tuple(np.float32(1 / n) for n in (17, 15, 13, 11, 9, 7, 5, 3))


def bucket_scores(
    logits_NRB: Float32, *, loss: Loss, estimator: Estimator, repetitions: Sequence[int] = (), n_threads: int = N_THREADS
) -> Float32:
    """Turn head outputs into bucket scores, in the same memory, such that aggregating them over r scores a label.

    Probabilities are the softmax over B for the softmax loss, sigmoids for the others, within 3 units in the last place.
    "mean" gives (B P - 1) / ((B - 1) R), whose sum is unbiased if two labels share a bucket with chance 1/B. For the identity
    table no two labels do: take "min" there, which for R = 1 is P itself (`decode_topk` does).

    Args:    logits_NRB, float32, C-contiguous, writable: overwritten. repetitions, the number of each row, for the error text.
    Returns: logits_NRB; finite.
    Raises:  ConfigError if an output is not finite or reaches 1e30 (the array is then spoiled), or the array is of another kind.
    Source:  Medini et al., NeurIPS 2019, arXiv:1910.13830, theorem 2 ("mean").
    """
    flags = logits_NRB.flags
    if logits_NRB.dtype != np.float32 or logits_NRB.ndim != 3 or not flags.c_contiguous or not flags.writeable:
        raise ConfigError(
            f"head outputs must be a writable C-contiguous float32 array (N, R, B), got {logits_NRB.dtype} {logits_NRB.shape}"
            f"{'' if flags.c_contiguous else ', not contiguous'}{'' if flags.writeable else ', read-only'}"
        )
    N, R, B = logits_NRB.shape
    scale, shift = (B / ((B - 1) * R), -1 / ((B - 1) * R)) if estimator == "mean" else (1.0, 0.0)
    broken_N = np.full(N, GOOD)
    kind, n_each = transform_of(loss, estimator), -(-N // n_threads) or 1
    tasks = [
        (logits_NRB[a : a + n_each], kind, np.float32(scale), np.float32(shift), broken_N[a : a + n_each])
        for a in range(0, N, n_each)
    ]
    in_threads(_transform, tasks, n_threads)
    if (broken_N != GOOD).any():
        sample = int(np.argmax(broken_N != GOOD))
        row = int(broken_N[sample])
        refuse(sample, repetitions[row] if repetitions else row)
    return logits_NRB


def refuse(sample: int, repetition: int) -> NoReturn:
    """Raise ConfigError for an output that is not finite or reaches 1e30."""
    raise ConfigError(
        f"sample {sample}, repetition {repetition}: the head gave an output that is not a finite number below {LIMIT:.0e}; "
        "train or copy this repetition again, or decode without it"
    )


def transform_of(loss: Loss, estimator: Estimator) -> int:
    """Give the number of the transform that makes bucket scores of outputs."""
    if estimator == "logits":
        return RAW
    if estimator == "log-probs":
        return LOG_SOFTMAX if loss == "softmax" else LOG_SIGMOID
    return SOFTMAX if loss == "softmax" else SIGMOID


@jit_ieee
def _transform(logits_NRB: Float32, kind: int, scale: np.float32, shift: np.float32, broken_N: npt.NDArray[np.int64]) -> None:
    """Transform every row; note in broken_N the first repetition of a sample that has an output out of range."""
    for n in range(logits_NRB.shape[0]):
        for r in range(logits_NRB.shape[1]):
            row_B = logits_NRB[n, r]
            if not _all_below_limit(row_B):
                if broken_N[n] == GOOD:
                    broken_N[n] = r
            elif kind == SIGMOID:
                _sigmoid(row_B, scale, shift)
            elif kind == LOG_SIGMOID:
                _log_sigmoid(row_B)
            elif kind != RAW:
                _softmax(row_B, scale, shift, kind == LOG_SOFTMAX)


@jit
def _all_below_limit(row_B: Float32) -> bool:
    n_good = 0  # counted, not left at the first bad one: the loop stays free of branches and is vectorised
    for b in range(len(row_B)):
        n_good += abs(row_B[b]) < LIMIT  # false for nan
    return n_good == len(row_B)


@jit
def exp_of(x: np.float32) -> np.float32:
    """Give e**x for x <= 0 (e**-87 for x < -87) with a relative error below 1e-7, in a form that vectorises: libm's does not.

    x = n ln 2 + y with |y| <= ln 2 / 2; e**y by the minimax polynomial of Cephes' expf; 2**n by its exponent bits.
    """
    x = x if x > np.float32(-87) else np.float32(-87)
    rounded = np.float32(x * LOG2_E + ROUND)
    n = rounded - ROUND
    y = (x - n * LN2_HIGH) - n * LN2_LOW
    power = (((((EXP[0] * y + EXP[1]) * y + EXP[2]) * y + EXP[3]) * y + EXP[4]) * y + EXP[5]) * y * y + y + ONE
    return power * np.int32((np.float32(rounded).view(np.int32) - ROUND_BITS) << 23).view(np.float32)


@jit_ieee
def sigmoid_of(x: np.float32) -> np.float32:
    """Give 1 / (1 + exp(-x))."""
    small = exp_of(-abs(x))
    return (small if x < ZERO else ONE) / (ONE + small)


@jit_ieee
def log_sigmoid_of(x: np.float32) -> np.float32:
    """Give min(x, 0) - log(1 + e), e = exp(-|x|), by log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3, its series to s**17."""
    small = exp_of(-abs(x))
    s = small / (ONE + ONE + small)
    t = s * s
    tail = (((ATANH[0] * t + ATANH[1]) * t + ATANH[2]) * t + ATANH[3]) * t + ATANH[4]
    tail = (((tail * t + ATANH[5]) * t + ATANH[6]) * t + ATANH[7]) * t
    return (x if x < ZERO else ZERO) - (s + s) * (ONE + tail)


@jit_ieee
def _sigmoid(row_B: Float32, scale: np.float32, shift: np.float32) -> None:
    for b in range(len(row_B)):
        row_B[b] = sigmoid_of(row_B[b]) * scale + shift


@jit_ieee
def _log_sigmoid(row_B: Float32) -> None:
    for b in range(len(row_B)):
        row_B[b] = log_sigmoid_of(row_B[b])


@jit_ieee
def _softmax(row_B: Float32, scale: np.float32, shift: np.float32, as_log: bool) -> None:
    top = row_B[0]
    for b in range(len(row_B)):
        top = max(top, row_B[b])
    total = 0.0  # float64: B may be the number of labels
    if as_log:
        for b in range(len(row_B)):
            row_B[b] -= top
            total += float(exp_of(row_B[b]))
        log_total = np.float32(math.log(total))
        for b in range(len(row_B)):
            row_B[b] -= log_total
        return
    for b in range(len(row_B)):
        row_B[b] = exp_of(row_B[b] - top)
    for b in range(len(row_B)):
        total += row_B[b]
    factor = np.float32(scale / total)
    for b in range(len(row_B)):
        row_B[b] = row_B[b] * factor + shift
