"""The types in which a head's weights may be stored, and stochastic rounding to them: up or down, right on average.

An update of a weight is mostly far smaller than the step between two numbers of 16 or 8 bits: rounded to the nearest, it would be
lost. Rounded up with the chance of its distance from below, it arrives on average.

What decides is a random number u of 32 bits: a hash of (seed, step, repetition, row), to which each column of the row adds the
golden ratio's share of 2**32. So u is uniform for each weight and step, and the columns of a row spread theirs evenly, which is
quicker than a hash a weight. No state, the same bits for any chunk, number of threads, device and backend. float8 is e4m3, of
32 times the weight: up to +-14, in steps of 2**-14 near zero.

Within kernels (numba) an array of bfloat16 is its bits, uint16, and one of float8 is its bits, uint8.
Sources: Croci et al. 2022, R. Soc. Open Sci. 9:211631 (stochastic rounding); Micikevicius et al. 2022, arXiv:2209.05433 (e4m3);
         Wellons 2018, "Prospecting for hash functions" (the mixing of 32 bits); Kuipers & Niederreiter 1974, Uniform
         Distribution of Sequences (multiples of the golden ratio).
"""

from __future__ import annotations

from typing import Any

import numba.extending
import numpy as np
import torch
from numba import types
from torch import Tensor

from mach.config import HeadPrecision
from mach.kernels import array_of, bits_of, float_of, in_threads, jit, jit_ieee, write

FLOAT8 = torch.float8_e4m3fn
FLOAT8_SCALE = 32  # times the weight is what is stored
FLOAT8_MAX = 448
BFLOAT16_MAX = np.float32(3.3895313892515355e38)
STORAGE = {"bfloat16": torch.bfloat16, "float8": FLOAT8}  # what is not here keeps the type of the model
NARROW = tuple(STORAGE.values())
ROWS = 1 << 12  # that one thread widens at a time
MASK = 0xFFFFFFFF
GOLDEN, OTHER = 0x9E3779B1, 0x85EBCA6B  # odd numbers that spread steps, rows, columns; and repetitions
FIRST, SECOND = 0x7FEB352D, 0x846CA68B  # of the mixing


def key_of(seed: int, step: int, repetition: int) -> int:
    """Give the key, of 32 bits, of the rounding of one repetition in one step."""
    return _mix_int((step_key(seed, step) + repetition * OTHER) & MASK)


def step_key(seed: int, step: int) -> int:
    """Give the key, of 32 bits, of a step, before repetitions part."""
    return _mix_int((seed & MASK) ^ _mix_int(((seed >> 32) + step * GOLDEN) & MASK))


def _mix_int(x: int) -> int:
    x ^= x >> 16
    x = x * FIRST & MASK
    x ^= x >> 15
    x = x * SECOND & MASK
    return x ^ x >> 16


def narrow(weight: Tensor, precision: HeadPrecision) -> Tensor:
    """Round weights to the nearest of a type of storage; too large ones to its largest in float8."""
    if precision == "float8":
        return (weight * FLOAT8_SCALE).clamp_(-FLOAT8_MAX, FLOAT8_MAX).to(FLOAT8)
    return weight.to(STORAGE.get(precision, weight.dtype))


def widen(stored: Tensor, out: Tensor) -> Tensor:
    """Write stored weights (R, C, D) as numbers of another type of float into `out`, of their shape, and give it; exact."""
    if stored.dtype != FLOAT8:
        return out.copy_(stored)
    if stored.device.type != "cpu":
        return out.copy_(stored).mul_(1 / FLOAT8_SCALE)
    for whole, part in zip(out, stored, strict=True):  # torch takes 40 times as long
        tasks = [
            (array_of(whole[c : c + ROWS].view(-1)), array_of(part[c : c + ROWS].reshape(-1))) for c in range(0, len(part), ROWS)
        ]
        in_threads(_widen, tasks, torch.get_num_threads())
    return out


def narrow_randomly(weight_RCD: Tensor, dtype: torch.dtype, keys: list[int], first: int = 0) -> Tensor:
    """Round weights of R repetitions stochastically to bfloat16 or float8, on any device.

    Args: weight, float32; keys, one a repetition (`key_of`); first, the number of the first row in the whole head.
    """
    noise = noise_of(keys, first, weight_RCD.shape[1], weight_RCD.shape[2], weight_RCD.device)
    bits = weight_RCD.float().contiguous().view(torch.int32)
    return _to_bfloat16(bits, noise) if dtype == torch.bfloat16 else _to_float8(bits, noise)


def narrow_rows(weight_URD: Tensor, dtype: torch.dtype, keys: list[int], rows_U: Tensor) -> Tensor:
    """Round some rows of R repetitions stochastically, float32 to bfloat16, on any device.

    Args: keys, one a repetition of the model; where each row holds one, R is 1 and row f of repetition f mod their number.
    """
    _, R, D = weight_URD.shape
    places = rows_U[:, None] * R + torch.arange(R, device=rows_U.device)
    key_UR = torch.tensor([signed(k) for k in keys], dtype=torch.int32, device=rows_U.device)[places % len(keys)]
    row_UR1 = _mix(key_UR ^ _wrapped(places // len(keys) * GOLDEN))[:, :, None]
    noise = row_UR1 + _wrapped(torch.arange(D, device=rows_U.device) * GOLDEN)
    bits = weight_URD.float().contiguous().view(torch.int32)
    return _to_bfloat16(bits, noise) if dtype == torch.bfloat16 else _to_float8(bits, noise)


def noise_of(keys: list[int], first: int, n_rows: int, width: int, device: torch.device) -> Tensor:
    """Give the random bits u of some rows as int32 (R, C, D): torch has no arithmetic of uint32."""
    key_R11 = torch.tensor([signed(k) for k in keys], dtype=torch.int32, device=device)[:, None, None]
    row_C1 = torch.arange(first, first + n_rows, device=device)[:, None]  # int64: a whole head may have more rows than int32
    row_RC1 = _mix(key_R11 ^ _wrapped(row_C1 * GOLDEN))
    return row_RC1 + _wrapped(torch.arange(width, device=device) * GOLDEN)


def signed(x: int) -> int:
    """Give the int32 of the same bits as an unsigned number."""
    return x - (1 << 32) if x >> 31 else x


def _wrapped(x: Tensor) -> Tensor:
    """Give the lowest 32 bits of int64 as int32."""
    return ((x & MASK) ^ 0x80000000).sub_(0x80000000).int()


def _mix(x: Tensor) -> Tensor:
    """Mix int32 in place, as if unsigned."""
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    x *= FIRST
    x ^= (x >> 15).bitwise_and_(0x1FFFF)
    x *= signed(SECOND)
    x ^= (x >> 16).bitwise_and_(0xFFFF)
    return x


def _to_bfloat16(bits: Tensor, u: Tensor) -> Tensor:
    x = bits.view(torch.float32)
    up = (bits + torch.where(x.abs() < float(BFLOAT16_MAX), (u >> 16).bitwise_and_(0xFFFF), 0)).bitwise_right_shift_(16)
    return torch.where(x.isnan(), 0x7FC0, up).to(torch.int16).view(torch.bfloat16)


def _to_float8(bits: Tensor, u: Tensor) -> Tensor:
    scaled = (bits & 0x7FFFFFFF).view(torch.float32) * FLOAT8_SCALE
    is_nan = scaled.isnan()
    scaled.nan_to_num_(nan=0.0).clamp_(max=FLOAT8_MAX)
    exponent = (scaled.view(torch.int32) >> 23).sub_(127).clamp_(min=-6)
    scaled *= (130 - exponent).bitwise_left_shift_(23).view(torch.float32)  # in units of the step, below 16: exact
    whole = scaled.floor()
    share = (scaled.sub_(whole)).mul_(65536)  # 16 bits at a time: int32 holds no 32 unsigned ones
    high = share.floor()
    low = share.sub_(high).mul_(65536).int() + (u & 0xFFFF)
    carry = (high.int() + (u >> 16).bitwise_and_(0xFFFF) + (low >> 16)) >> 16
    code = ((exponent + 7) << 3) + whole.int() - 8 + carry
    code = torch.where(is_nan, 0x7F, code.clamp_(max=0x7E)) | (bits >> 24).bitwise_and_(0x80)
    return code.to(torch.uint8).view(FLOAT8)


@jit
def _bits(x: np.float32) -> np.uint32:
    return np.float32(x).view(np.uint32)


@jit
def _float(bits: np.uint32) -> np.float32:
    return np.uint32(bits).view(np.float32)


@jit
def mixed(x: np.uint32) -> np.uint32:
    """Let every bit depend on every bit."""
    x = np.uint32(x ^ (x >> np.uint32(16)))
    x = np.uint32(x * np.uint32(FIRST))
    x = np.uint32(x ^ (x >> np.uint32(15)))
    x = np.uint32(x * np.uint32(SECOND))
    return np.uint32(x ^ (x >> np.uint32(16)))


@jit
def row_key(key: np.uint32, row: int) -> np.uint32:
    """Give the key of a row of a repetition whose key is given."""
    return mixed(np.uint32(key ^ np.uint32(np.uint64(row) * np.uint64(GOLDEN) & np.uint64(MASK))))


@jit
def column_noise(key: np.uint32, d: int) -> np.uint32:
    """Give the random bits of a column of a row whose key is given."""
    return np.uint32(key + np.uint32(np.uint32(d) * np.uint32(GOLDEN)))


@jit
def bfloat16_bits(x: np.float32, u: np.uint32) -> np.uint16:
    """Round to bfloat16, stochastically. What is finite stays so; infinity stays, and NaN.

    Cutting off what is at least the largest finite number leaves that number or infinity: no noise there, no overflow.
    """
    noise = np.uint32(np.uint32(u) >> np.uint32(16)) if abs(x) < BFLOAT16_MAX else np.uint32(0)
    bits = np.uint16(np.uint32(np.float32(x).view(np.uint32) + noise) >> np.uint32(16))
    return bits if x == x else np.uint16(0x7FC0)


@jit_ieee
def float8_bits(x: np.float32, u: np.uint32) -> np.uint8:
    """Round 32 x to e4m3, stochastically; at most 448. NaN stays."""
    bits = np.float32(x).view(np.uint32)
    sign = np.uint32(np.uint32(bits >> np.uint32(24)) & np.uint32(0x80))
    magnitude = np.float32(_float(np.uint32(bits & np.uint32(0x7FFFFFFF))) * np.float32(FLOAT8_SCALE))
    is_nan = magnitude != magnitude
    scaled = np.float32(magnitude if magnitude < np.float32(FLOAT8_MAX) else np.float32(FLOAT8_MAX))
    exponent = max(np.int32(np.int32(np.uint32(_bits(scaled) >> np.uint32(23))) - np.int32(127)), np.int32(-6))
    steps = np.float32(scaled * _float(np.uint32(np.int32(130) - exponent << np.int32(23))))  # below 16: exact
    whole = np.int32(steps)
    share = np.float32(np.float32(steps - np.float32(whole)) * np.float32(65536))  # 16 bits at a time, as int32 vectorises
    high = np.int32(share)
    rest = np.int32(np.float32(np.float32(share - np.float32(high)) * np.float32(65536)))
    low = np.int32(rest + np.int32(u & np.uint32(0xFFFF)))
    carry = np.int32(np.int32(high + np.int32(np.uint32(u >> np.uint32(16))) + (low >> np.int32(16))) >> np.int32(16))
    code = np.int32(((exponent + np.int32(7)) << np.int32(3)) + whole - np.int32(8) + carry)
    known = np.uint32(0x7F) if is_nan else np.uint32(min(code, np.int32(0x7E)))
    return np.uint8(known | sign)


@jit
def float_of_float8(bits: np.uint8) -> np.float32:
    """Give the weight that the bits of a float8 stand for."""
    code = np.uint32(bits & np.uint8(0x7F))
    x = np.float32(np.uint32(code << np.uint32(20)).view(np.float32) * np.float32(2.0**120 / FLOAT8_SCALE))
    x = np.float32(np.nan) if code == np.uint32(0x7F) else x
    return -x if bits & np.uint8(0x80) else x


@jit
def _widen(out: np.ndarray, stored: np.ndarray) -> None:
    for i in range(len(out)):
        write(out, i, float_of_float8(stored[i]))


def load_row(row: Any, stored: Any) -> None:
    """Within a kernel: read a stored row into a row of floats."""
    raise NotImplementedError  # numba compiles its overload instead


def store_row(stored: Any, row: Any, key: Any) -> None:
    """Within a kernel: write a row of floats, rounded by the row's key where it is stored in less."""
    raise NotImplementedError  # numba compiles its overload instead


def subtract_row(stored: Any, change: Any, scale: Any, key: Any) -> None:
    """Within a kernel: take a row of floats, times a number, from a stored one of floats or bfloat16, in one pass; as above."""
    raise NotImplementedError  # numba compiles its overload instead


@numba.extending.overload(load_row)  # type: ignore[untyped-decorator]  # numba has no types
def _load_row(row: Any, stored: Any) -> Any:
    def plain(row: Any, stored: Any) -> Any:
        for d in range(len(row)):
            row[d] = stored[d]

    def bfloat16(row: Any, stored: Any) -> Any:
        for d in range(len(row)):
            row[d] = float_of(stored[d])

    def float8(row: Any, stored: Any) -> Any:
        for d in range(len(row)):
            row[d] = float_of_float8(stored[d])

    return {types.uint16: bfloat16, types.uint8: float8}.get(stored.dtype, plain)


@numba.extending.overload(store_row)  # type: ignore[untyped-decorator]  # numba has no types
def _store_row(stored: Any, row: Any, key: Any) -> Any:
    def plain(stored: Any, row: Any, key: Any) -> Any:
        for d in range(len(row)):
            stored[d] = row[d]

    def bfloat16(stored: Any, row: Any, key: Any) -> Any:
        for d in range(len(row)):
            stored[d] = bfloat16_bits(np.float32(row[d]), column_noise(key, d))

    def float8(stored: Any, row: Any, key: Any) -> Any:
        for d in range(len(row)):
            stored[d] = float8_bits(np.float32(row[d]), column_noise(key, d))

    return {types.uint16: bfloat16, types.uint8: float8}.get(stored.dtype, plain)


@numba.extending.overload(subtract_row, jit_options={"fastmath": {"contract"}})  # type: ignore[untyped-decorator]  # no types
def _subtract_row(stored: Any, change: Any, scale: Any, key: Any) -> Any:
    def plain(stored: Any, change: Any, scale: Any, key: Any) -> Any:
        for d in range(len(stored)):
            stored[d] -= scale * change[d]

    def bfloat16(stored: Any, change: Any, scale: Any, key: Any) -> Any:
        for d in range(len(stored)):
            stored[d] = bfloat16_bits(np.float32(float_of(stored[d]) - scale * change[d]), column_noise(key, d))

    return bfloat16 if stored.dtype == types.uint16 else plain


@jit
def store_compensated(stored: np.ndarray, lost: np.ndarray, row: np.ndarray) -> None:
    """Write a row in bfloat16, to the nearest, and what that loses of it, in bfloat16 too: the two are read as their sum.

    Source: Kahan 1965, Commun. ACM 8(1) (compensation); Zamirai et al. 2020, arXiv:2010.06192 (of updates in bfloat16).
    """
    for d in range(len(row)):
        x = np.float32(row[d])
        bits = bits_of(x)
        stored[d] = bits
        lost[d] = bits_of(np.float32(x - float_of(bits)))
