"""Stochastic rounding: against exact fractions, the same bits in torch and in kernels, right on average, frozen."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mach.heads import rounding
from mach.heads.rounding import (
    FLOAT8,
    bfloat16_bits,
    float8_bits,
    float_of_float8,
    key_of,
    narrow,
    narrow_randomly,
    noise_of,
    widen,
)
from mach.kernels import float_of, jit

CPU = torch.device("cpu")
M = 2**32
TYPES = {torch.bfloat16: (np.uint16, torch.int16), FLOAT8: (np.uint8, torch.uint8)}


def mix(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % M
    x ^= x >> 15
    x = x * 0x846CA68B % M
    return x ^ x >> 16


def noise_reference(seed, step, repetition, row, column):
    key = mix((seed % M) ^ mix(((seed >> 32) + step * 0x9E3779B1) % M))
    row_key = mix(mix((key + repetition * 0x85EBCA6B) % M) ^ row * 0x9E3779B1 % M)
    return (row_key + column * 0x9E3779B1) % M


def bfloat16_reference(x, u):
    """Give the value: the lower neighbour in magnitude, or the upper one if the rest and u make a whole; finite stays finite."""
    if not np.isfinite(x):
        return float(x)
    exponent = max(int(np.floor(np.log2(abs(float(x)) or 1e-45))), -126)
    if Fraction(abs(float(x))) < Fraction(2) ** exponent and exponent > -126:
        exponent -= 1  # the logarithm was rounded up
    step = Fraction(2) ** (exponent - 7)
    whole = int((Fraction(abs(float(x))) / step + Fraction(u >> 16, 1 << 16)) // 1) * step
    return float(np.copysign(min(float(whole), 2.0**127 * (2 - 2**-7)), x))


def float8_reference(x, u):
    """Give 32 times the value: floor(m / quantum + u / 2^32) quantum, at most 448."""
    if np.isnan(x):
        return float("nan")
    m = min(Fraction(abs(float(x))) * 32, Fraction(448)) if np.isfinite(x) else Fraction(448)
    exponent = -6
    while Fraction(2) ** (exponent + 1) <= m:
        exponent += 1
    quantum = Fraction(2) ** (exponent - 3)
    return float(np.copysign(float(min(int((m / quantum + Fraction(u, M)) // 1) * quantum, Fraction(448))), x))


@jit
def _store(stored, rows, keys, first):
    for r in range(len(rows)):
        for c in range(rows.shape[1]):
            rounding.store_row(stored[r, c], rows[r, c], rounding.row_key(keys[r], first + c))


@jit
def _load(rows, stored):
    for r in range(len(rows)):
        for c in range(rows.shape[1]):
            rounding.load_row(rows[r, c], stored[r, c])


def by_kernel(x_RCD, dtype, keys, first):
    stored = np.zeros(x_RCD.shape, TYPES[dtype][0])
    _store(stored, x_RCD, np.array(keys, np.uint32), first)
    return stored


def bits(tensor):
    kind, view = TYPES[tensor.dtype]
    return tensor.contiguous().view(view).numpy().view(kind)


words = st.integers(0, M - 1)
floats = st.one_of(words, st.integers(0x30000000, 0x43000000), st.sampled_from([0, 0x80000000, 1, 0x7F800000, 0xFF800000]))
noises = st.one_of(words, st.sampled_from([0, 1, M - 1, 0xFFFF, 0xFFFF0000, 0x80000000]))


@settings(max_examples=300)
@given(floats, noises)
def test_rounding_equals_exact_fractions(word, u):
    x = np.array([word], np.uint32).view(np.float32)[0]
    wide, narrow_ = float(float_of(bfloat16_bits(x, np.uint32(u)))), float(float_of_float8(float8_bits(x, np.uint32(u))))
    np.testing.assert_equal(wide, bfloat16_reference(x, u))
    np.testing.assert_equal(32 * narrow_, float8_reference(x, u))
    assert np.isnan(x) or (np.signbit(narrow_) == np.signbit(x) and np.signbit(wide) == np.signbit(x))


PLACES = (st.integers(0, high) for high in (2**63 - 1, 2**40, 10**5, 2**40))  # seed, step, repetition, row


@settings(max_examples=100)
@given(*PLACES, st.integers(1, 4), st.integers(1, 40))
def test_noise_is_the_hash_of_its_place(seed, step, repetition, first, n_rows, width):
    u = noise_of([key_of(seed, step, repetition)], first, n_rows, width, CPU).numpy().view(np.uint32)
    truth = [[noise_reference(seed, step, repetition, first + c, d) for d in range(width)] for c in range(n_rows)]
    assert u[0].tolist() == truth


@settings(max_examples=100)
@given(st.integers(0, 2**32 - 1), st.integers(0, 2**34), st.booleans(), st.sampled_from(list(TYPES)))
def test_torch_and_kernels_give_the_same_bits(seed, first, any_bits, dtype):
    rng = np.random.default_rng(seed)
    scales = 10.0 ** rng.integers(-9, 3, (2, 3, 1))
    edges = [3.4028235e38, -3.4028235e38, 3.39e38, np.inf, -np.inf, np.nan, 0.0, -0.0, 14.0, -14.2, 1e-45]
    x = rng.integers(0, M, (2, 3, 37)).astype(np.uint32).view(np.float32) if any_bits else rng.normal(size=(2, 3, 37)) * scales
    x, keys = np.ascontiguousarray(x, np.float32), [key_of(seed, 5, r) for r in (0, 9)]
    x[1, 2, : len(edges)] = edges
    by_torch, here = narrow_randomly(torch.from_numpy(x), dtype, keys, first), by_kernel(x, dtype, keys, first)
    np.testing.assert_array_equal(bits(by_torch), here)
    rows, wide = np.empty_like(x), widen(by_torch, torch.empty(x.shape))
    _load(rows, here)
    np.testing.assert_array_equal(rows, wide.numpy())  # NaN equals NaN here


def test_bits_are_frozen():
    """A change makes resumed runs end otherwise, and kernels of other backends disagree."""
    assert key_of(0, 1, 0) == 2159226863 and key_of(2**62 + 5, 7, 3) == 3726298445
    u = noise_of([key_of(2**62 + 5, 7, 3)], 2**33 + 1, 2, 3, CPU).numpy().view(np.uint32)
    assert u.tolist() == [[[1801135952, 160604417, 2815040178], [4006348370, 2365816835, 725285300]]]
    x = torch.tensor([[[0.1, -0.1, 3.14159], [1e-3, -2e-5, 13.9]]])
    frozen_bits = {
        torch.bfloat16: [[[15821, 48588, 16457], [14979, 47016, 16734]]],
        FLOAT8: [[[69, 196, 109], [16, 128, 126]]],
    }
    for dtype, frozen in frozen_bits.items():
        assert bits(narrow_randomly(x, dtype, [key_of(1, 1, 0)])).tolist() == frozen


COMMON = (0.1, -0.7654321, 3.0e-5, -1.0e-4, 1e-6, 1.0, 13.7, -(2.0**-14))


@pytest.mark.parametrize(("dtype", "x"), [(dtype, x) for dtype in TYPES for x in COMMON] + [(torch.bfloat16, 1e-39)])
def test_rounding_is_right_on_average_between_the_two_neighbours(dtype, x):
    """Subnormals of both types are among them: below 2**-11 in float8, and 1e-39 in bfloat16."""
    n, value = 200_000, float(np.float32(x))
    found = widen(narrow_randomly(torch.full((1, n // 100, 100), value), dtype, [key_of(3, 4, 5)]), torch.empty(1, n // 100, 100))
    values = found.double().unique().tolist()
    assert len(values) <= 2 and min(values) <= value <= max(values)
    gap = max(values) - min(values)
    share = (value - min(values)) / gap if gap else 0.0
    sigma = gap * (share * (1 - share) / n) ** 0.5
    assert abs(float(found.double().mean()) - value) <= 5 * sigma + 2**-40 * abs(value)


def test_neighbours_in_row_step_repetition_and_seed_are_unrelated():
    """Correlations of the noise of neighbouring places stay within 5 sigma of none."""
    n_rows = 1 << 16
    u = {
        "here": noise_of([key_of(1, 1, 0)], 0, n_rows, 1, CPU), "step": noise_of([key_of(1, 2, 0)], 0, n_rows, 1, CPU),
        "repetition": noise_of([key_of(1, 1, 1)], 0, n_rows, 1, CPU), "row": noise_of([key_of(1, 1, 0)], 1, n_rows, 1, CPU),
        "seed": noise_of([key_of(2, 1, 0)], 0, n_rows, 1, CPU),
    }  # fmt: skip
    x = {name: value.double().flatten() for name, value in u.items()}
    for name, other in x.items():
        if name != "here":
            assert abs(float(torch.corrcoef(torch.stack([x["here"], other]))[0, 1])) < 5 / n_rows**0.5, name
    assert abs(float(x["here"].mean())) < 5 * 2**32 / 12**0.5 / n_rows**0.5


@given(st.integers(0, M - 1), st.integers(0, 500), st.integers(1, 600), st.floats(0, 1))
def test_the_columns_of_a_row_spread_their_noise_evenly(key, first, n, share):
    """Of n columns in a row, those below any share are that share of n but for 1 + log2(n) / 2 (independent: n**0.5 / 2)."""
    u = (key + np.arange(first, first + n, dtype=np.uint64) * 0x9E3779B1) % M
    np.testing.assert_array_equal(u, [rounding.column_noise(np.uint32(key), d) for d in range(first, first + n)])
    assert abs(np.count_nonzero(u < share * M) - share * n) <= 1 + np.log2(n) / 2


@pytest.mark.parametrize("u", [0, 1, 0xFFFF, M - 1])
def test_what_is_too_large_saturates_and_what_is_no_number_stays(u):
    u, largest = np.uint32(u), np.float32(3.3895314e38)
    for x in (np.float32(3.4028235e38), largest):
        assert float(float_of(bfloat16_bits(x, u))) == pytest.approx(3.3895314e38, rel=1e-7)
        assert float(float_of(bfloat16_bits(-x, u))) == pytest.approx(-3.3895314e38, rel=1e-7)
        assert float_of_float8(float8_bits(x, u)) == 14 and float_of_float8(float8_bits(-x, u)) == -14
    assert float_of(bfloat16_bits(np.float32(np.inf), u)) == np.inf and float_of(bfloat16_bits(np.float32(-np.inf), u)) == -np.inf
    assert float_of_float8(float8_bits(np.float32(-np.inf), u)) == -14
    for nan in (0x7F800001, 0x7FC00000, 0xFFFFFFFF):
        x = np.array([nan], np.uint32).view(np.float32)[0]
        assert np.isnan(float_of(bfloat16_bits(x, u))) and np.isnan(float_of_float8(float8_bits(x, u)))
    assert float_of_float8(float8_bits(np.float32(13.0), u)) == 13  # representable: never moved
    assert float(float_of(bfloat16_bits(np.float32(1.5), u))) == 1.5


def test_every_float8_is_read_as_torch_reads_it():
    stored = torch.arange(256, dtype=torch.uint8).view(FLOAT8)
    truth = stored.double() / 32
    np.testing.assert_array_equal([float_of_float8(b) for b in stored.view(torch.uint8).numpy()], truth.float().numpy())
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        found = widen(stored.view(1, 16, 16), torch.empty(1, 16, 16, dtype=dtype))
        np.testing.assert_array_equal(found.double().flatten().numpy(), truth.numpy())


def test_a_strided_part_is_widened_and_no_more(monkeypatch):
    monkeypatch.setattr(rounding, "ROWS", 3)
    stored = narrow(torch.randn(2, 20, 4), "float8")
    out = widen(stored[:, 5:16], torch.zeros(2, 11, 4))
    assert torch.equal(out, stored.float()[:, 5:16] / 32)


@given(st.floats(-1024, 1024, width=32))
def test_narrowing_goes_to_the_nearest(x):
    weight = torch.tensor([[x]])
    assert torch.equal(narrow(weight, "float32"), weight) and torch.equal(narrow(weight, "bfloat16"), weight.bfloat16())
    found = float(narrow(weight, "float8").double()) / 32
    others = torch.arange(0, 127, dtype=torch.uint8).view(FLOAT8).double() / 32
    assert abs(abs(found) - abs(x)) == pytest.approx(float((others - abs(x)).abs().min()), abs=1e-12)
