"""Bars and lines say what they are given."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from mach.draw import BLOCKS, SPARK, bar, spark


@given(st.floats(0, 1), st.integers(1, 60))
def test_a_bar_has_its_width_and_its_share(share, width):
    text = bar(share, width)
    eighths = sum(BLOCKS.index(c) for c in text)
    assert len(text) == width and abs(eighths - 8 * width * share) <= 0.5 and text.rstrip(" ") == text.strip(" ")


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_longer_bar_says_more(one, other):
    low, high = sorted((one, other))
    assert sum(map(BLOCKS.index, bar(low))) <= sum(map(BLOCKS.index, bar(high)))


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200), st.integers(1, 80), st.booleans())
def test_any_values_can_be_drawn(values, width, log):
    finite, drawn = [v for v in values if math.isfinite(v)], spark(values, width, log=log)
    assert len(drawn) == min(width, len(finite)) and set(drawn) <= set(SPARK)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60))
def test_larger_values_are_drawn_higher(values):
    heights = [SPARK.index(c) for c in spark(values)]
    assert [h for _, h in sorted(zip(values, heights, strict=True))] == sorted(heights)


def test_falling_losses_fall_evenly_on_their_scale():
    assert spark([2.0**-i for i in range(8)], log=True) == "█▇▆▅▄▃▂▁"
    assert spark([0, 1, 2, 3, 4, 5, 6, 7]) == SPARK
