# mypy: ignore-errors
"""How Triton's kernels round: to the nearest, or stochastically by bits that are hashed, as `mach.heads.rounding` specifies.

Triton's interpreter rounds to bfloat16 by cutting off: `nearest_of` does it in integers there.
"""

import os

import triton
import triton.language as tl

GOLDEN = tl.constexpr(0x9E3779B1)
FIRST, SECOND = tl.constexpr(0x7FEB352D), tl.constexpr(0x846CA68B)
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def mixed(x):
    """Let every bit of a uint32 depend on every bit."""
    x ^= x >> 16
    x *= FIRST
    x ^= x >> 15
    x *= SECOND
    return x ^ (x >> 16)


@triton.jit
def nearest_of(x, TYPE: tl.constexpr):
    """Round numbers to the nearest of a type, ties to even."""
    if INTERPRETED and TYPE == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan")).to(tl.bfloat16)
    return x.to(TYPE)


@triton.jit
def bfloat16_of(x, u):
    """Round float32 to bfloat16, stochastically.

    Cutting off what is at least the largest finite number leaves that number, infinity or NaN: no noise there, no overflow.
    """
    noise = tl.where(tl.abs(x) < 3.3895313892515355e38, u >> 16, 0)
    bits = (x.to(tl.uint32, bitcast=True) + noise) & 0xFFFF0000
    return tl.where(x == x, bits.to(tl.float32, bitcast=True), float("nan")).to(tl.bfloat16)


@triton.jit
def float8_of(x, u):
    """Round 32 times a float32 to e4m3, stochastically; at most 448."""
    scaled = tl.minimum(tl.abs(x) * 32, 448.0)
    exponent = tl.maximum((scaled.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    steps = scaled * ((130 - exponent) << 23).to(tl.float32, bitcast=True)  # in units of the last bit, below 16: exact
    whole = tl.floor(steps)
    share = ((steps - whole) * 4294967296.0).to(tl.uint32)
    code = ((exponent + 6) << 3) + whole.to(tl.int32) + (u + share < u).to(tl.int32)  # a sum past 2**32 rounds up
    code = tl.where(x == x, code, 0x7F) | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)
    return code.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
