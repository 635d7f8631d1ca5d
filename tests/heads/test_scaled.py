"""Hidden vectors in float8 against exact fractions and torch's own cast, and a step whose outputs come of them."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_heads import LOSSES, bytes_for, positives_of, problems, reference, step

from mach.heads import LinearHead
from mach.heads.rounding import FLOAT8, narrow, widen
from mach.heads.scaled import LEAST, scaled

CODES = [(code, float(torch.tensor([code], dtype=torch.uint8).view(FLOAT8))) for code in range(0x7F)]  # those above zero, rising


def nearest_reference(x):
    """Give the nearest number of e4m3, of two that are as near that of the even code; one by one."""
    near = min(CODES, key=lambda each: (abs(Fraction(each[1]) - abs(Fraction(x))), each[0] % 2))
    return math.copysign(near[1], x)


def scale_reference(numbers):
    """Give the least power of two, from 2 ** LEAST, of which no number is more than 448; for zeros what is as good as any."""
    most, exponent = max(Fraction(abs(x)) for x in numbers), LEAST
    while most > 448 * Fraction(2) ** exponent:
        exponent += 1
    return 2.0**exponent if most else 2.0**-9


@settings(max_examples=200)
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=6), st.integers(-105, 120), st.booleans(),
    st.sampled_from([torch.bfloat16, torch.float32, torch.float64]),
)  # fmt: skip
def test_numbers_are_rounded_to_the_nearest_in_units_of_a_power_of_two(numbers, exponent, is_near, dtype):
    """Small numbers beside a large one fall among the subnormal ones; of a long way below, to zero."""
    spread = [x if is_near else x * 2.0 ** (-4 * i) for i, x in enumerate(numbers)]
    hidden = (torch.tensor(spread, dtype=torch.float64) * 2.0**exponent).to(dtype)[None, None]
    exact, found = hidden.flatten().tolist(), scaled(hidden)
    scale = scale_reference(exact)
    assert found.scales.tolist() == [[scale]]
    expected = [nearest_reference(x / scale) for x in exact]
    assert found.values.double().flatten().tolist() == expected
    by_torch = (hidden.double() / scale).to(FLOAT8)
    assert torch.equal(found.values.view(torch.uint8), by_torch.view(torch.uint8))
    for wide in (torch.bfloat16, torch.float32, torch.float64):
        assert found.widened(wide).dtype == wide
        assert found.widened(wide).double().flatten().tolist() == [x * scale for x in expected]


def test_every_number_of_e4m3_and_the_middle_of_any_two():
    grid = torch.tensor([value for _, value in CODES])
    middles = (grid[1:] + grid[:-1]) / 2
    for numbers in (grid[:-1], middles, torch.nextafter(middles, grid.new_tensor(0.0)), torch.nextafter(middles, grid[-1:])):
        hidden = torch.cat([numbers, -numbers, grid.new_tensor([440.0])])[None, None]  # the largest makes the scale 1
        found = scaled(hidden)
        assert found.scales.item() == 1.0
        assert found.values.double().flatten().tolist() == [nearest_reference(x) for x in hidden.flatten().tolist()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_samples_of_zeros_of_the_smallest_numbers_and_of_what_is_not_finite(dtype):
    largest = torch.finfo(dtype).max / 2
    rows = [[0.0, 0.0], [1e-40, -1e-40], [448.0, 1.0], [-largest, 1.0], [math.inf, 1.0], [1.0, math.nan]]
    found = scaled(torch.tensor([rows], dtype=torch.float64).to(dtype))
    assert found.scales[0, :3].tolist() == [2.0**-9, 2.0**LEAST, 1.0]
    assert found.scales[0].isfinite().tolist() == [True] * 4 + [False] * 2
    wide = found.widened(dtype)[0]
    assert not wide[:2].any() and wide[2].tolist() == [448.0, 1.0] and wide[3].isfinite().all()
    assert wide[4:].isnan().all()


def test_numbers_may_lie_in_memory_in_any_order():
    hidden = torch.randn(5, 3, 9, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(scaled(hidden).widened(dtype), scaled(hidden.contiguous()).widened(dtype))


def test_samples_have_scales_of_their_own():
    hidden = torch.randn(2, 5, 9, generator=torch.Generator().manual_seed(0)) * 10.0 ** torch.arange(-2.0, 3)[None, :, None]
    found = scaled(hidden)
    for r, n in np.ndindex(2, 5):
        alone = scaled(hidden[r : r + 1, n : n + 1])
        assert torch.equal(alone.scales[0, 0], found.scales[r, n])
        assert torch.equal(alone.values.view(torch.uint8)[0, 0], found.values.view(torch.uint8)[r, n])
    most = (found.values.float().abs().amax(2)).flatten()
    assert ((most > 223) & (most <= 448)).all()


@settings(max_examples=100)
@given(problems(), st.sampled_from(LOSSES), st.integers(1, 26))
def test_a_step_of_such_outputs_is_autograds_straight_through(problem, loss, width):
    """In float64, so that only wrong numbers could differ."""
    hidden, weight, bias, is_positive = problem
    stored = narrow(weight, "float8")
    seen = scaled(hidden).widened(torch.float64)
    truth = reference(hidden, widen(stored, torch.empty_like(weight)), bias, is_positive, loss, seen)
    chunk_bytes = bytes_for(width, hidden)
    found = step(hidden, stored.clone(), bias.clone(), positives_of(is_positive), loss, chunk_bytes=chunk_bytes, in_float8=True)
    for ours, theirs in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("products", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_other_products_are_of_the_type_asked_for(loss, products):
    rng = np.random.default_rng(6)
    is_positive = rng.random((3, 16, 40)) < 0.05
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((3, 16, 8), (3, 40, 8), (3, 40)))
    hidden, stored, types = hidden.to(products), narrow(weight, "float8"), set()
    head = LinearHead(stored, bias, in_float8=True)
    gradient, value = head.step(
        hidden, positives_of(is_positive), loss=loss, want_loss=True,
        update=lambda name, part, g, copy: types.add((name, g.dtype)),
    )  # fmt: skip
    assert types == {("head.weight", products), ("head.bias", torch.float32)} and gradient.dtype == torch.float32
    exact = (hidden.double(), widen(stored, torch.empty(weight.shape, dtype=torch.float64)), bias.double(), is_positive, loss)
    truth = reference(*exact, scaled(hidden).widened(torch.float64))
    allowed = 2e-5 if products == torch.float32 else 0.02
    for ours, theirs in ((value, truth[0]), (gradient, truth[1])):
        torch.testing.assert_close(ours.double(), theirs, rtol=allowed, atol=allowed * float(theirs.abs().max()))
    plain, _ = LinearHead(stored, bias).step(
        hidden, positives_of(is_positive), loss=loss, want_loss=False, update=lambda *_: None
    )
    assert not torch.allclose(plain, gradient, rtol=allowed)


def test_what_is_asked_of_the_head_is_not_rounded():
    rng = np.random.default_rng(8)
    hidden, weight, bias = (torch.from_numpy(rng.normal(size=s)).float() for s in ((1, 4, 5), (1, 23, 5), (1, 23)))
    stored = narrow(weight, "float8")
    ours, plain = (LinearHead(stored, bias, in_float8=asked) for asked in (True, False))
    assert torch.equal(ours.logits(hidden), plain.logits(hidden))
    rooms = [torch.empty(4 * 23) for _ in range(2)]
    assert torch.equal(*(head.some_logits(hidden, slice(3, 9), room) for head, room in zip((ours, plain), rooms, strict=True)))
